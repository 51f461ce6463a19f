"""Ops of MoE blocks with gradients of their own: over sorted rows, each expert on its own alone.

PyTorch differentiates `stack[expert]` into a gradient as large as the whole stack, once for each
expert, and a gather into a scatter that adds row by row. Here

    rows = dispatch(x)        dx[t]  = sum over s of drows[slots[t, s]]
    y = product(rows, w)      drows  = dy @ w[e],  dw[e] = dy^T @ rows,  db[e] = sum of dy
    z = combine(y, weights)   dy[r]  = weights[order[r]] * dz[order[r] // k]
                              dweights[t, s] = <dz[t], y[slots[t, s]]>

so that a gradient is written once, where it stays, and experts that nobody chose cost nothing but
their zeros. Sums over a token's choices are in float32, in the order of the slots; all is
deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moec.ir import Op
from moec.ops.definition import Reference, Runner
from moec.ops.dispatch import sort_choices


class _Dispatch(torch.autograd.Function):
    """x[T, D], order[R], slots[T, k] -> rows[R, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return x.index_select(0, order // slots.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slots,) = ctx.saved_tensors
        return _sum_of_choices(grad, slots), None, None


def _sum_of_choices(rows: Tensor, slots: Tensor) -> Tensor:
    """rows[R, D] -> [T, D]: the sum of each token's, in float32."""
    total = rows.index_select(0, slots[:, 0]).float()
    for s in range(1, slots.shape[1]):
        total += rows.index_select(0, slots[:, s])
    return total.to(rows.dtype)


class _Product(torch.autograd.Function):
    """rows[R, K], ends, w[E, N, K], b[E, N]? -> [R, N]; rows of nobody become 0."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ends: list[int], w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, w)
        ctx.ends = ends
        y = rows.new_empty(len(rows), w.shape[1])
        for expert, some in _owned(ends):
            if b is None:
                torch.mm(rows[some], w[expert].t(), out=y[some])
            else:
                torch.addmm(b[expert], rows[some], w[expert].t(), out=y[some])
        y[ends[-1] :].zero_()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, w = ctx.saved_tensors
        need_rows, _, need_w, need_b = ctx.needs_input_grad
        grad = grad.contiguous()
        drows = torch.empty_like(rows) if need_rows else None
        dw = torch.empty_like(w) if need_w else None
        db = grad.new_zeros(w.shape[:2]) if need_b else None
        for expert, some in _owned(ctx.ends):
            if drows is not None:
                torch.mm(grad[some], w[expert], out=drows[some])
            if dw is not None:
                _outer(grad[some], rows[some], dw[expert])
            if db is not None:
                torch.sum(grad[some], 0, out=db[expert])
        if drows is not None:
            drows[ctx.ends[-1] :].zero_()
        if dw is not None:
            busy = {expert for expert, _ in _owned(ctx.ends)}
            for expert in set(range(len(dw))) - busy:
                dw[expert].zero_()
        return drows, None, dw, db


def _owned(ends: Sequence[int]) -> list[tuple[int, slice]]:
    """The experts that have rows, and which."""
    pairs = zip([0, *ends], ends, strict=False)
    return [(expert, slice(*pair)) for expert, pair in enumerate(pairs) if pair[0] < pair[1]]


def _outer(grad: Tensor, rows: Tensor, out: Tensor) -> None:
    """out[N, K] = grad^T @ rows, for weights that lie transposed as well."""
    if out.is_contiguous():
        torch.mm(grad.t(), rows, out=out)
    else:
        torch.mm(rows.t(), grad, out=out.t())


class _Combine(torch.autograd.Function):
    """rows[R, D], order[R], slots[T, k], weights[T, k]? -> z[T, D] of `dtype`."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        order: Tensor,
        slots: Tensor,
        weights: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(rows, order, slots, weights)
        total = rows.new_zeros(len(slots), rows.shape[1], dtype=torch.float32)
        for s in range(slots.shape[1]):
            picked = rows.index_select(0, slots[:, s])
            if weights is None:
                total += picked
            else:
                total.addcmul_(picked.float(), weights[:, s, None].float())
        return total.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, order, slots, weights = ctx.saved_tensors
        drows = dweights = None
        if ctx.needs_input_grad[0]:
            drows = grad.index_select(0, order // slots.shape[1])
            if weights is not None:
                drows = drows * weights.reshape(-1)[order][:, None]
            drows = drows.to(rows.dtype)
        if weights is not None and ctx.needs_input_grad[3]:
            wide = grad.float()
            dots = [(wide * rows.index_select(0, column)).sum(-1) for column in slots.unbind(1)]
            dweights = torch.stack(dots, 1).to(weights.dtype)
        return drows, None, None, dweights, None


def _apply(function: Any, *arguments: Any) -> Tensor:
    made: Tensor = function.apply(*arguments)
    return made


def _sort(experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    order, slots, ends = sort_choices(experts, count)
    return order.long(), slots.long(), ends


def _dispatch(op: Op, tensors: Sequence[Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    x, experts, *weights = tensors
    order, slots, ends = _sort(experts, attrs["num_experts"])
    rows = _apply(_Dispatch, x, order, slots)
    if weights:
        rows = rows * weights[0].reshape(-1)[order][:, None].to(rows.dtype)
    return rows, order.int(), ends


def _linear(op: Op, tensors: Sequence[Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    rows, ends, w, *b = tensors
    made = _apply(_Product, rows, ends.tolist(), w, b[0] if b else None)
    return made.to(attrs["dtype"])


def _combine(op: Op, tensors: Sequence[Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    rows, places, *rest = tensors
    order = places.long()
    slots = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    slots = slots.reshape(-1, attrs["k"])
    weights = rest[0] if attrs.get("weighted") else None
    return _apply(_Combine, rows, order, slots, weights, attrs["dtype"])


DIFFERENTIABLE: Mapping[str, Reference] = {
    "moe.dispatch": _dispatch,
    "grouped.linear": _linear,
    "moe.combine": _combine,
}
"""What the ops of an expanded region compute where their gradient is wanted: neither bodies nor
gathers are fused into them yet."""
