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
