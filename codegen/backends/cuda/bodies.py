"""Bodies of experts as epilogues of a product: float32 scalars, computed as loops compute them."""

from __future__ import annotations

from collections.abc import Mapping

from tvm.ir import Expr

from moec.codegen.cuda.activation import Epilogue
from moec.codegen.loops import index as ix
from moec.codegen.loops.emission import Emission
from moec.codegen.loops.emit import EMIT
from moec.codegen.loops.index import Sizes
from moec.codegen.loops.scalars import Scalar
from moec.dtypes import HALVES
from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Value
from moec.target.cuda import HOST


def check_body(body: Graph) -> None:
    """Raises NoMatch unless an element of the result depends only on the inputs' elements at its
    position."""
    if body.params or len(body.outputs) != 1:
        raise NoMatch("its body has weights, or several results")
    shapes = {v.shape for v in body.inputs}
    for op in body.ops:
        rule = EMIT.get(op.name)
        local = rule is not None and rule.point is not None and rule.same_position
        if not local or any(v.shape not in (*shapes, ()) for v in op.inputs):
            raise NoMatch(f"its body has {op.name}, which is not element-wise")
    dtypes = {v.dtype for v in body.values()} - {"f32", *HALVES}
    if dtypes:
        raise NoMatch(f"its body computes in {', '.join(sorted(dtypes))}")


def epilogue(body: Graph) -> Epilogue:
    """The body as a function of sums. Results of half types are rounded after every op, as in
    eager."""
    producers: Mapping[Value, Op] = {v: op for op in body.ops for v in op.outputs}

    def join(*sums: Expr) -> Expr:
        emission = Emission({}, {}, producers, Sizes({}), HOST)
        out = body.outputs[0]
        at = tuple(ix.Index(ix.const(0).expr, f"axis{axis}") for axis in range(len(out.shape)))
        keys = tuple(i.key for i in at)
        for value, x in zip(body.inputs, sums, strict=True):
            emission.memos[-1][(value, keys)] = Scalar(value.dtype, x)
        return emission.read(out, at).expr

    return join
