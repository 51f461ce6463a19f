"""An MoE layer becomes one dense layer, whose weights are the mean of its experts'.

    w, ids = moe.route(logits)
    rows, order, ends = moe.dispatch(x, ids)
    out = moe.experts(rows, ends, w1, w2) { … }     ->    h = aten.linear(x, mean(w1))
    y = moe.combine(out, order, w)                        a = aten.silu(h)
                                                          y = aten.linear(a, mean(w2))

For experts that were trained to average their weights after every step (Experts Weights
Averaging). Exact up to rounding where the experts are equal: the result is multiplied by the sum of
the router's weights, a constant for a router that renormalises and computed for any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch

from moec.errors import NoMatch
from moec.ir.graph import DType, Op, Program, TensorType, Value
from moec.ir.ops.routing.routing import widened
from moec.passes.calibration.evaluator import LayerStats
from moec.passes.calibration.session import Change
from moec.passes.core.inline import inline_body
from moec.passes.core.moe_layer import MOVES, Layer, Splice, constant
from moec.passes.core.options import option, validate

EPSILON = 1e-6  # the greatest epsilon in a router's normalising sum that still counts as exact


@dataclass(frozen=True)
class AverageExperts:
    """Replace each layer by one dense layer with the mean of its experts' weights."""

    by: str = option(
        "uniform",
        "weights of the mean: equal for all experts (uniform), or by how many tokens choose an "
        "expert (usage)",
        choices=("uniform", "usage"),
    )
    name: ClassVar[str] = "average-experts"
    source: ClassVar[str] = "Experts Weights Averaging, arXiv 2308.06093"

    def __post_init__(self) -> None:
        validate(self)

    def change(self, program: Program, layer: Layer, stats: LayerStats) -> Change:
        if any(op.name == "moe.capacity" for op in layer.between):
            raise NoMatch(
                "the router drops choices beyond a capacity, which a dense layer cannot do"
            )
        if layer.combine.attrs.get("added"):
            raise NoMatch("another branch is added inside moe.combine")
        body = layer.experts.body
        assert body is not None
        share = self.shares(layer, stats)
        splice = Splice(program)
        ops: list[Op] = []
        x = _scale_input(splice, layer, ops)
        params = {
            param: splice.weight(stack.name, mean(constant(program, stack), share))
            for param, stack in zip(body.params, layer.stacks, strict=True)
        }
        body_ops, y = inline_body(splice, body, x, params, layer.experts.origin)
        ops += body_ops
        y = _scale_by_router(splice, program, layer, y, ops)
        if ops[-1].outputs != (y,):
            splice.emit(ops, "aten.alias.default", (y,), y.type, layer.combine)
        ops[-1] = replace(ops[-1], outputs=(layer.output,))
        splice.put(layer.combine, ops)
        return Change(
            splice.done(), None, f"{layer.count} experts become one, weighted by {self.by}"
        )

    def shares(self, layer: Layer, stats: LayerStats) -> torch.Tensor:
        """The weight of each expert in the mean: f32[E], with a sum of 1."""
        if self.by == "uniform":
            return torch.full((layer.count,), 1 / layer.count)
        usage = stats.usage(layer.count).float()
        return usage / usage.sum()


def mean(stack: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The weighted mean of the rows of a stack [E, …], summed in float32 or wider."""
    if not stack.is_floating_point():
        raise NoMatch(f"the experts' weights are {stack.dtype}, whose mean is not defined")
    total: torch.Tensor = torch.tensordot(share.to(widened(stack).dtype), widened(stack), 1)
    return total.to(stack.dtype)


def _scale_input(splice: Splice, layer: Layer, ops: list[Op]) -> Value:
    """The input of the dense layer: x, or x times the router's weight where that scales inputs."""
    x = layer.dispatch.inputs[0]
    if len(layer.dispatch.inputs) == 2:
        return x
    if layer.routing.k > 1:
        raise NoMatch(f"each of {layer.routing.k} choices scales its own input")
    weights = splice.cast(ops, layer.dispatch.inputs[2], x.dtype, layer.combine)
    return splice.emit(ops, "aten.mul.Tensor", (x, weights), x.type, layer.combine)


def _scale_by_router(
    splice: Splice, program: Program, layer: Layer, y: Value, ops: list[Op]
) -> Value:
    """y times the sum of the router's weights, in the dtype of the layer's result."""
    like = layer.combine
    total = _sum_of_weights(program, layer)
    if total is None:
        weights = like.inputs[2]
        type = TensorType(weights.dtype, (weights.shape[0], 1))
        one = splice.emit(
            ops, "aten.sum.dim_IntList", (weights,), type, like, dim=(1,), keepdim=True
        )
        one = splice.cast(ops, one, y.dtype, like)
        y = splice.emit(ops, "aten.mul.Tensor", (y, one), y.type, like)
    elif total != 1:
        y = splice.emit(ops, "aten.mul.Tensor", (y,), y.type, like, other=total)
    return splice.cast(ops, y, cast(DType, like.attrs["dtype"]).name, like)


def _sum_of_weights(program: Program, layer: Layer) -> float | None:
    """The sum of each token's routing weights; None if that depends on the token."""
    if not layer.combine.attrs.get("weighted"):
        return float(layer.routing.k)
    value = layer.combine.inputs[2]
    while (op := program.graph.producers.get(value)) is not None and op.name in MOVES:
        value = op.inputs[0]
    routing = layer.routing
    sums = routing.after == "softmax" or (routing.renormalize and routing.epsilon <= EPSILON)
    constant_sum = value is layer.route.outputs[0] and sums and routing.score != "sparsemixer"
    return routing.scale if constant_sum else None
