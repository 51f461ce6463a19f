"""Routes each token of a layer to fewer experts.

    w, ids = moe.route(logits) <k=8>               w, ids = moe.route(logits) <k=6>
    rows, order, ends = moe.dispatch(x, ids)  ->   rows, order, ends = moe.dispatch(x, ids)
    y = moe.combine(out, order, w) <k=8>           y = moe.combine(out, order, w) <k=6>

The experts of a token are the best of those it had. A router that renormalises gives them larger
weights; any other leaves the weights of the dropped ones out.
"""

from __future__ import annotations

from dataclasses import replace

from moec.errors import NoMatch
from moec.ir.graph import Op, Program, TensorType, Value
from moec.ops import OPS
from moec.passes.core.moe_layer import Layer, Splice

_CASTS = ("aten._to_copy.default", "aten.alias.default")
_BLOCK = ("moe.route", "moe.dispatch", "moe.experts", "moe.combine")


def reduce_top_k(program: Program, layer: Layer, k: int) -> Program:
    """The program in which each token takes only the best `k` of the layer's choices.

    Raises NoMatch for a router whose k is more than a number, and for other readers of its choices.
    """
    if layer.routing.score == "sparsemixer":
        raise NoMatch("the router samples two experts one after the other")
    if layer.companions:
        raise NoMatch("another block takes the same choices")
    splice = Splice(program)
    fewer: dict[Value, Value] = {}
    for op in program.graph.ops:
        if op is not layer.route and not any(value in fewer for value in op.inputs):
            continue
        if op.name not in (*_CASTS, *_BLOCK):
            raise NoMatch(f"{op.name} reads the router's choices or weights")
        inputs = tuple(fewer.get(value, value) for value in op.inputs)
        attrs = {**op.attrs, "k": k} if "k" in op.attrs else op.attrs
        changed = replace(op, inputs=inputs, attrs=attrs)
        outputs = [
            value if value.type == type else Value(value.name, type)
            for value, type in zip(op.outputs, _types(changed), strict=True)
        ]
        fewer |= {old: new for old, new in zip(op.outputs, outputs, strict=True) if new is not old}
        if any(value in fewer for value in program.graph.results if value in op.outputs):
            raise NoMatch("the router's choices or weights are an output of the model")
        splice.put(op, [replace(changed, outputs=tuple(outputs))])
    return splice.done()


def _types(op: Op) -> tuple[TensorType, ...]:
    if op.name in _CASTS:
        return (TensorType(op.outputs[0].dtype, op.inputs[0].shape),)
    return OPS[op.name].infer(op)
