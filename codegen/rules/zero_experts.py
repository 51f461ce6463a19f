"""Experts without a network."""

from __future__ import annotations

from tvm import relax

from moec.codegen.backend import Rule, require
from moec.codegen.loops import scalars as sc
from moec.codegen.module_builder import Lowering
from moec.codegen.specs.routing import ZeroSpec
from moec.dtypes import VECTOR_DTYPES
from moec.ir.graph import Graph, Op
from moec.ir.ops.experts.zero_experts import ZeroExperts


def _check(op: Op, graph: Graph) -> None:
    parts = ZeroExperts.of(op)
    require(parts.experts.dtype == "i64", f"its choices are {parts.experts.dtype}, not i64")
    dtypes = {v.dtype for v in op.inputs if v is not parts.experts} - set(VECTOR_DTYPES)
    require(not dtypes, f"it reads {', '.join(sorted(dtypes))}")


def _zero_experts(low: Lowering, op: Op) -> list[relax.Expr]:
    parts, out = ZeroExperts.of(op), op.outputs[0]
    top_k, width = parts.experts.shape[1], parts.x.shape[1]
    assert isinstance(top_k, int)
    assert isinstance(width, int)
    kinds = [
        None if v is None else sc.STORED[v.dtype]
        for v in (parts.weights, parts.mix, parts.constants, parts.addend)
    ]
    spec = ZeroSpec(
        parts.first,
        parts.kinds,
        top_k,
        width,
        sc.STORED[parts.x.dtype],
        sc.STORED[out.dtype],
        *kinds,
    )
    function = low.kernel(spec, "zero_experts")
    low.note(op, "zero_experts")
    return low.call(function, [low.value(v) for v in op.inputs], [out.type])


RULES = (Rule("zero_experts", ("moe.zero_experts",), _check, _zero_experts),)
