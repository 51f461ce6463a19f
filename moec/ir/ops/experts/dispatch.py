"""moe.sort, moe.dispatch, moe.experts, moe.combine: rows sorted by expert, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from moec.ir.graph import DType, Graph, Op, TensorType
from moec.ir.opdef import Runner, defop, integer, require, tensors_of
from moec.ir.sizes.dims import Dim


def sort_choices(experts: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    flat = experts.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    slots = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    ends = torch.bincount(flat, minlength=count)[:count].cumsum(0)
    return order.int(), slots.reshape(experts.shape).int(), ends.int()


def chooses_all(graph: Graph, dispatch: Op) -> bool:
    """Whether each token of a moe.dispatch chooses the experts 0 .. E-1, in this order."""
    choice = dispatch.inputs[1]
    repeated = graph.producers.get(choice)
    if repeated is None or repeated.name != "aten.expand.default":
        return False
    ids, count = graph.producers.get(repeated.inputs[0]), dispatch.attrs["num_experts"]
    return ids is not None and ids.name == "aten.arange.default" and choice.shape[-1] == count


def _infer_sort(op: Op) -> tuple[TensorType, ...]:
    require(op, all(len(v.shape) == 2 for v in op.inputs), "choices are [T, k]")
    tokens, k = op.inputs[0].shape
    return (
        TensorType("i32", (k * tokens,)),
        TensorType("i32", (tokens, k)),
        TensorType("i32", (integer(op, "num_experts"),)),
    )


SORTS = ("moe.sort", "moe.dispatch")
"""The ops that sort the choices of tokens by expert."""


@defop("moe.sort", _infer_sort, "experts", tokenwise=True)
def sort(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """experts[T, k] -> order[R], slots[T, k] (the row of each choice), ends[E]."""
    return sort_choices(tensors[0], attrs["num_experts"])


def _infer_dispatch(op: Op) -> tuple[TensorType, ...]:
    x, experts = op.inputs[:2]
    require(op, len(x.shape) == 2 and len(experts.shape) == 2, f"{x} by {experts}")
    require(op, x.shape[0] == experts.shape[0], f"{x.shape[0]} tokens, {experts.shape[0]} choices")
    rows = experts.shape[1] * experts.shape[0]
    return (
        TensorType(x.dtype, (rows, x.shape[1])),
        TensorType("i32", (rows,)),
        TensorType("i32", (integer(op, "num_experts"),)),
    )


@defop("moe.dispatch", _infer_dispatch, "x, experts, weights?", tokenwise=True)
def dispatch(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """x[T, D], experts[T, k], weights[T, k]? -> rows[R, D], order[R], ends[E].

    With weights, each row is scaled by its routing weight before the experts (Llama 4).
    """
    x, experts = tensors[:2]
    order, _, ends = sort_choices(experts, attrs["num_experts"])
    rows = x[order.long() // experts.shape[1]]
    if len(tensors) > 2:
        rows = rows * tensors[2].reshape(-1)[order.long()][:, None].to(rows.dtype)
    return rows, order, ends


def _infer_experts(op: Op) -> tuple[TensorType, ...]:
    rows, ends, *stacks = op.inputs
    body = op.body
    require(op, body is not None, "has no body")
    body = cast(Graph, body)
    require(op, len(body.inputs) == 1 and len(body.outputs) == 1, "a body maps rows to rows")
    require(op, len(body.params) == len(stacks), "a body takes one slice of each stack")
    for stack, param in zip(stacks, body.params, strict=True):
        require(op, stack.shape[:1] == ends.shape, f"{stack} is not stacked over {ends.shape}")
        require(op, stack.shape[1:] == param.shape, f"{stack} feeds {param}")
    require(op, body.inputs[0].shape[1:] == rows.shape[1:], f"{rows} feeds {body.inputs[0]}")
    result = body.outputs[0]
    return (TensorType(result.dtype, (rows.shape[0], *result.shape[1:])),)


@defop("moe.experts", _infer_experts, "rows, ends, stacks*", tokenwise=True)
def experts(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """rows[R, D], ends[E], stacked params -> rows: the body over each expert's rows."""
    rows, ends, *stacks = tensors
    assert op.body is not None
    # With unbind, autograd writes the gradient of a stack once, not once per expert.
    slices = [stack.unbind() for stack in stacks]
    parts, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        parts.append(run(op.body, [rows[start:end], *(param[expert] for param in slices)])[0])
        start = end
    rest = rows.shape[0] - start
    parts.append(parts[0].new_zeros(rest, *parts[0].shape[1:]))
    return torch.cat(parts)


def _infer_combine(op: Op) -> tuple[TensorType, ...]:
    rows, permutation = op.inputs[:2]
    k = integer(op, "k")
    tokens = cast(Dim, op.attrs["tokens"])
    require(
        op,
        permutation.shape in ((k * tokens,), (tokens, k)),
        f"{permutation} does not hold the choices",
    )
    dtype = cast(DType, op.attrs["dtype"]).name
    return (TensorType(dtype, (tokens, rows.shape[1])),)


@defop("moe.combine", _infer_combine, "rows, order, weights?weighted, addend?added", tokenwise=True)
def combine(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """rows[R, D], order[R] or slots[T, k], weights[T, k]?, addend[T, D]? -> y[T, D].

    y[t] = sum over s of weights[t, s] * rows[slots[t, s]] (+ addend[t]), summed in float32 (rows
    in float64: in float64) in the order of the slots. Rows without an expert are zero and add
    nothing, although their weight is NaN (0 / 0 of a token whose choices are all beyond a
    capacity). Attributes: `k`, `tokens` (T), `dtype` of y, `weighted`, `added`.
    """
    rows, permutation, weights, addend = tensors_of("moe.combine", op, tensors, attrs).values()
    k = attrs["k"]
    order = permutation.long()
    if permutation.ndim == 1:
        slots = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    else:
        slots = order.reshape(-1)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    picked = rows.to(wide)[slots].reshape(-1, k, rows.shape[1])
    if weights is not None:
        factors = weights.to(wide).masked_fill((picked == 0).all(-1), 0.0)
        picked = picked * factors[..., None]
    total = picked[:, 0]
    for s in range(1, k):
        total = total + picked[:, s]
    if addend is not None:
        total = total + addend.to(wide)
    return total.to(attrs["dtype"])
