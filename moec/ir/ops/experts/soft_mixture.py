"""moe.soft_mixture: experts applied to slots, which are weighted sums of all tokens (Soft MoE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from moec.ir.graph import Graph, Op, TensorType
from moec.ir.opdef import Runner, defop, integer, require


def slots_of(op: Op) -> int:
    """The number of slots of each expert."""
    return cast(int, op.inputs[1].shape[2]) // integer(op, "num_experts")


def _infer_soft_mixture(op: Op) -> tuple[TensorType, ...]:
    x, dispatch, combine, *stacks = op.inputs
    body, experts = op.body, integer(op, "num_experts")
    require(op, body is not None, "has no body")
    body = cast(Graph, body)
    require(op, len(x.shape) == 3, f"{x} is not [B, S, D]")
    require(op, len(dispatch.shape) == 3, f"{dispatch} is not [B, S, N]")
    require(op, dispatch.shape == combine.shape, f"{dispatch} and {combine}")
    require(op, dispatch.shape[:2] == x.shape[:2], f"{dispatch} for {x}")
    slots = dispatch.shape[2]
    require(
        op, isinstance(slots, int) and slots % experts == 0, f"{slots} slots, {experts} experts"
    )
    require(op, len(body.inputs) == 1 and len(body.outputs) == 1, "a body maps rows to rows")
    require(op, body.inputs[0].shape[1:] == x.shape[2:], f"{x} feeds {body.inputs[0]}")
    require(op, len(body.params) == len(stacks), "a body takes one slice of each stack")
    for stack, param in zip(stacks, body.params, strict=True):
        require(op, stack.shape == (experts, *param.shape), f"{stack} feeds {param}")
    result = body.outputs[0]
    return (TensorType(result.dtype, (*x.shape[:2], *result.shape[1:])),)


@defop("moe.soft_mixture", _infer_soft_mixture, "x, dispatch, combine, stacks*")
def soft_mixture(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """x[B, S, D], dispatch[B, S, E*P], combine[B, S, E*P], stacked params -> y[B, S, D'].

    Puigcerver et al. 2023 (arXiv 2308.00951), equations 1 to 3. Slot n of a text is the sum of
    its tokens weighed by softmax(dispatch) over the tokens; expert n // P, the body, acts on it;
    a token gets the sum of all results weighed by softmax(combine) over the slots. In the paper
    both logits are the same, x @ phi. Attribute: `num_experts` (E).
    """
    x, dispatch, combine, *stacks = tensors
    body = cast(Graph, op.body)
    slots = dispatch.softmax(1).to(x.dtype).mT @ x
    parts = []
    for expert, rows in enumerate(slots.chunk(attrs["num_experts"], 1)):
        (part,) = run(body, [rows.flatten(0, 1), *(stack[expert] for stack in stacks)])
        parts.append(part.reshape(*rows.shape[:2], part.shape[1]))
    outputs = torch.cat(parts, 1)
    return combine.softmax(2).to(outputs.dtype) @ outputs


def _infer_even_ends(op: Op) -> tuple[TensorType, ...]:
    return (TensorType("i32", (integer(op, "num_experts"),)),)


@defop("moe.even_ends", _infer_even_ends, "")
def even_ends(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """-> ends[E] of rows of which each expert owns `each`: each, 2 * each, … E * each."""
    return (torch.arange(attrs["num_experts"]) + 1).mul(attrs["each"]).int()


def _infer_mixture(op: Op) -> tuple[TensorType, ...]:
    shares, *rest = op.inputs
    body = op.body
    require(op, body is not None, "has no body")
    assert body is not None
    require(op, shares.shape[-1] == len(body.outputs), f"{shares} weighs {len(body.outputs)}")
    parameters = (*body.inputs, *body.params)
    require(op, len(parameters) == len(rest), f"{len(rest)} values for {len(parameters)}")
    for value, parameter in zip(rest, parameters, strict=True):
        require(op, value.type == parameter.type, f"{value} feeds {parameter}")
    first = body.outputs[0]
    for other in body.outputs:
        require(op, other.type == first.type, f"experts give {first.type} and {other.type}")
    require(op, shares.shape[:-1] == first.shape[: len(shares.shape) - 1], f"{shares} of {first}")
    return (first.type,)


@defop("moe.mixture", _infer_mixture, "shares, values*")
def mixture(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """shares[.., E], inputs..., params... -> sum over e of shares[.., e] * (output e of the body).

    The body's inputs and params are the op's; its E outputs have one type. Experts may differ in
    everything else. Summed in the order of the experts.
    """
    shares, *rest = tensors
    assert op.body is not None
    outputs = run(op.body, rest)
    last = (1,) * (outputs[0].ndim - shares.ndim + 1)
    parts = [
        output * share.reshape(*share.shape, *last)
        for output, share in zip(outputs, shares.unbind(-1), strict=True)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


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
