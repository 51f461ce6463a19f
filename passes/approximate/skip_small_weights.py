"""Skips the experts of a token whose weights are small beside its greatest.

    w, ids = moe.route(logits)        ->   v, chosen = moe.route(logits)
                                           small = v < threshold * amax(v)
                                           ids = masked_fill(chosen, small, 8)
    … = moe.dispatch(x, ids) <8>           … = moe.dispatch(x, ids) <8>

The id after the last expert is no expert: such choices have no row, and add nothing. A router that
renormalises gives the others larger weights, with the same sum.
"""

from __future__ import annotations

from dataclasses import replace

from moec.errors import NoMatch
from moec.ir.graph import Op, Program, TensorType, Value
from moec.passes.core.moe_layer import Layer, Splice


def skip_small_weights(program: Program, layer: Layer, threshold: float) -> Program:
    """The program in which a token skips the experts with a weight under `threshold` times its
    greatest. Raises NoMatch for weights that may be negative, and for other readers of choices."""
    check_skippable(layer)
    routing, route = layer.routing, layer.route
    weights, ids = route.outputs
    renormalises = routing.renormalize or routing.after == "softmax"
    splice, ops = Splice(program), list[Op]()
    scores = splice.value(weights.name, weights.type) if renormalises else weights
    chosen = splice.value(ids.name, ids.type)
    ops.append(replace(route, outputs=(scores, chosen)))
    wide = splice.cast(ops, scores, "f32", route)
    column = TensorType("f32", (*ids.shape[:-1], 1))

    def reduced(name: str, value: Value) -> Value:
        return splice.emit(ops, name, (value,), column, route, dim=(1,), keepdim=True)

    greatest = reduced("aten.amax.default", wide)
    least = splice.emit(ops, "aten.mul.Tensor", (greatest,), column, route, other=threshold)
    flags = TensorType("bool", ids.shape)
    small = splice.emit(ops, "aten.lt.Tensor", (wide, least), flags, route)
    fill = "aten.masked_fill.Scalar"
    ops.append(Op(fill, (chosen, small), (ids,), {"value": layer.count}, None, route.origin))
    if renormalises:
        left = splice.emit(ops, fill, (wide, small), wide.type, route, value=0.0)
        sums = [reduced("aten.sum.dim_IntList", value) for value in (wide, left)]
        ratio = splice.emit(ops, "aten.div.Tensor", sums, column, route)
        scores = splice.emit(ops, "aten.mul.Tensor", (left, ratio), wide.type, route)
        splice.cast(ops, scores, weights.dtype, route)
        ops[-1] = replace(ops[-1], outputs=(weights,))
    splice.put(route, ops)
    return splice.done()


def check_skippable(layer: Layer) -> None:
    """Raises NoMatch where `skip_small_weights` does."""
    routing = layer.routing
    if routing.score == routing.after == "none":
        raise NoMatch("the router's weights are its logits, and may be negative")
    if layer.companions:
        raise NoMatch("another block takes the same choices")
    if any(op.name == "moe.capacity" for op in layer.between):
        raise NoMatch("the router drops choices beyond a capacity, which depends on all of them")
