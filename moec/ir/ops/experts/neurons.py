"""moe.neurons: experts of one neuron each, whose weights are rows of two tables (PEER)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from moec.ir.graph import Graph, Op, TensorType
from moec.ir.opdef import Runner, defop, require


def _infer_neurons(op: Op) -> tuple[TensorType, ...]:
    x, experts, weights, inward, outward = op.inputs
    body = op.body
    require(op, body is not None, "has no body")
    body = cast(Graph, body)
    require(op, len(x.shape) == 2 and len(experts.shape) == 2, f"{x} by {experts}")
    require(op, x.shape[0] == experts.shape[0], f"{x.shape[0]} tokens, {experts.shape[0]} choices")
    require(op, weights.shape == experts.shape, f"{weights} for {experts}")
    require(op, len(inward.shape) == 2 and inward.shape[1] == x.shape[1], f"{x} by {inward}")
    require(op, outward.shape[:1] == inward.shape[:1], f"{inward} and {outward}")
    require(op, len(body.inputs) == 1 and len(body.outputs) == 1, "a body maps sums to sums")
    require(op, not body.params, "the experts' weights are not its body's")
    return (TensorType(outward.dtype, (x.shape[0], outward.shape[1])),)


@defop("moe.neurons", _infer_neurons, "x, experts, weights, inward, outward", tokenwise=True)
def neurons(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """x[T, D], experts[T, k], weights[T, k], inward[E, D], outward[E, D'] -> y[T, D'].

    y[t] = sum over s of weights[t, s] * f(x[t] . inward[e]) * outward[e], e = experts[t, s], where
    the body is f, an element-wise function (He 2024, arXiv 2407.04153, equation 2).
    """
    x, experts, weights, inward, outward = tensors
    ids = experts.long()
    sums = (inward[ids] * x[:, None]).sum(2)
    (active,) = run(cast(Graph, op.body), [sums.flatten()])
    return ((active.view_as(weights) * weights)[..., None] * outward[ids]).sum(1)
