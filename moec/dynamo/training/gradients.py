"""Ops of MoE blocks with their own gradients, computed on sorted rows, expert by expert.

PyTorch differentiates `stack[expert]` into a gradient as large as the whole stack, once for each
expert, and a gather into a scatter that adds row by row. Here

    rows = dispatch(x)        dx[t]  = sum over s of drows[slots[t, s]]
    y = product(rows, w)      drows  = dy @ w[e],  dw[e] = dy^T @ rows,  db[e] = sum of dy
    z = combine(y, weights)   dy[r]  = weights[order[r]] * dz[order[r] // k]
                              dweights[t, s] = <dz[t], y[slots[t, s]]>

so that each gradient is written once, at its final address, and experts without rows cost only
zeroing. The last product and the combine are one op, whose gradient needs no y (_LastProduct). Sums
over a token's choices are in float32 (of float64 in float64), in the order of the slots; everything
is deterministic. The products are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moec.ir.graph import Op
from moec.ir.opdef import Reference, Runner, tensors_of
from moec.ir.ops.routing.routing import widened


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
    """rows[R, D] -> [T, D]: the sum of each token's rows, in float32 or float64."""
    total = widened(rows.index_select(0, slots[:, 0]))
    for s in range(1, slots.shape[1]):
        total += rows.index_select(0, slots[:, s])
    return total.to(rows.dtype)


class Products(Protocol):
    """Products of sorted rows with the stacked weights of all experts. Rows behind the last
    expert's end become 0."""

    def product(self, rows: Tensor, ends: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """rows[R, K], ends[E], w[E, N, K], b[E, N]? -> rows @ w[e]^T + b[e], [R, N]."""
        ...

    def mixed(self, grad: Tensor, ends: Tensor, w: Tensor) -> Tensor:
        """grad[R, N], ends[E], w[E, N, K] -> grad @ w[e], [R, K]."""
        ...

    def outer(self, grad: Tensor, rows: Tensor, ends: Tensor, w: Tensor) -> Tensor:
        """grad[R, N], rows[R, K], ends[E] -> grad^T @ rows of each expert, [E, N, K], with the
        strides of w; 0 for experts without rows."""
        ...


class _InPyTorch:
    """One PyTorch product after another, for each expert that has rows."""

    def product(self, rows: Tensor, ends: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        y = rows.new_empty(len(rows), w.shape[1])
        spans = ends.tolist()
        for expert, span in _owned(spans):
            if b is None:
                torch.mm(rows[span], w[expert].t(), out=y[span])
            else:
                torch.addmm(b[expert], rows[span], w[expert].t(), out=y[span])
        y[spans[-1] :].zero_()
        return y

    def mixed(self, grad: Tensor, ends: Tensor, w: Tensor) -> Tensor:
        drows = grad.new_empty(len(grad), w.shape[2])
        spans = ends.tolist()
        for expert, span in _owned(spans):
            torch.mm(grad[span], w[expert], out=drows[span])
        drows[spans[-1] :].zero_()
        return drows

    def outer(self, grad: Tensor, rows: Tensor, ends: Tensor, w: Tensor) -> Tensor:
        dw = torch.empty_like(w)
        spans = ends.tolist()
        for expert, span in _owned(spans):
            _outer(grad[span], rows[span], dw[expert])
        busy = {expert for expert, _ in _owned(spans)}
        for expert in set(range(len(dw))) - busy:
            dw[expert].zero_()
        return dw


IN_PYTORCH: Products = _InPyTorch()


class _Product(torch.autograd.Function):
    """`Products.product`, with a gradient."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, ends: Tensor, w: Tensor, b: Tensor | None, products: Products
    ) -> Tensor:
        ctx.save_for_backward(rows, ends, w)
        ctx.products = products
        return products.product(rows.contiguous(), ends, w, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, ends, w = ctx.saved_tensors
        need_rows, _, need_w, need_b, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        drows = ctx.products.mixed(grad, ends, w) if need_rows else None
        dw = ctx.products.outer(grad, rows.contiguous(), ends, w) if need_w else None
        db = None
        if need_b:
            db = _sums(grad, ends, w)
        return drows, None, dw, db, None


def _owned(ends: Sequence[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for each expert that has rows."""
    pairs = zip([0, *ends], ends, strict=False)
    return [(expert, slice(*pair)) for expert, pair in enumerate(pairs) if pair[0] < pair[1]]


def _sums(grad: Tensor, ends: Tensor, w: Tensor) -> Tensor:
    """grad[R, N] -> the sum of each expert's rows, [E, N], with the dtype of w[E, N, K]."""
    db = grad.new_zeros(w.shape[:2], dtype=w.dtype)
    for expert, span in _owned(ends.tolist()):
        torch.sum(grad[span], 0, dtype=w.dtype, out=db[expert])
    return db


def _outer(grad: Tensor, rows: Tensor, out: Tensor) -> None:
    """out[N, K] = grad^T @ rows, also for transposed weights."""
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
        return _weighted_sum(rows, slots, weights, dtype)

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
            wide = widened(grad)
            dots = [(wide * rows.index_select(0, column)).sum(-1) for column in slots.unbind(1)]
            dweights = torch.stack(dots, 1).to(weights.dtype)
        return drows, None, None, dweights, None


def _weighted_sum(
    rows: Tensor, slots: Tensor, weights: Tensor | None, dtype: torch.dtype
) -> Tensor:
    total = widened(rows.new_zeros(len(slots), rows.shape[1]))
    for s in range(slots.shape[1]):
        picked = rows.index_select(0, slots[:, s])
        if weights is None:
            total += picked
        else:
            total.addcmul_(picked.to(total.dtype), weights[:, s, None].to(total.dtype))
    return total.to(dtype)


class _LastProduct(torch.autograd.Function):
    """rows[R, K], ends, w[E, N, K], b[E, N]?, order[R], slots[T, k], weights[T, k]? -> z[T, N].

    A product followed by a combine. The gradient of weights is <dz[t], y[r]> = <dz[t] @ w[e],
    rows[r]>, plus the bias's share. Its left factor is computed for drows anyway, so y is not
    needed. Without `valued`, where only the gradient is needed, z is 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        ends: Tensor,
        w: Tensor,
        b: Tensor | None,
        order: Tensor,
        slots: Tensor,
        weights: Tensor | None,
        dtype: torch.dtype,
        products: Products,
        valued: bool,
    ) -> Tensor:
        ctx.save_for_backward(rows, ends, w, b, order, slots, weights)
        ctx.products = products
        if not valued:
            return rows.new_zeros((), dtype=dtype).expand(len(slots), w.shape[1])
        y = products.product(rows.contiguous(), ends, w, b)
        return _weighted_sum(y, slots, weights, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, ends, w, b, order, slots, weights = ctx.saved_tensors
        need_rows, _, need_w, need_b, _, _, need_weights, *_ = ctx.needs_input_grad
        dz = grad.index_select(0, order // slots.shape[1]).to(rows.dtype)
        scale = None if weights is None else weights.reshape(-1)[order][:, None]
        drows = dw = db = dweights = None
        if need_rows or need_weights:
            unscaled = ctx.products.mixed(dz, ends, w)
            if need_rows:
                drows = unscaled if scale is None else (unscaled * scale).to(rows.dtype)
            if need_weights:
                dots = (widened(unscaled) * rows).sum(-1)
                if b is not None:
                    for expert, span in _owned(ends.tolist()):
                        dots[span] += widened(dz[span]) @ widened(b[expert])
                dweights = dots[slots].to(weights.dtype)
        if need_w:
            scaled = rows if scale is None else (rows * scale).to(rows.dtype)
            dw = ctx.products.outer(dz, scaled.contiguous(), ends, w)
        if need_b:
            db = _sums(dz if scale is None else dz * scale, ends, w)
        return drows, None, dw, db, None, None, dweights, None, None, None


def _apply(function: Any, *arguments: Any) -> Tensor:
    result: Tensor = function.apply(*arguments)
    return result


def _sort(experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """order, slots and ends of choices experts[T, k]; on a GPU without waiting for them."""
    ids, order = torch.sort(experts.reshape(-1), stable=True)
    slots = torch.empty_like(order).scatter_(0, order, _numbers(order))
    every = torch.arange(count, device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(ids, every, right=True, out_int32=True)
    return order, slots.reshape(experts.shape), ends


def _dispatch(op: Op, tensors: Sequence[Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    x, experts, weights = tensors_of("moe.dispatch", op, tensors, attrs).values()
    order, slots, ends = _sort(experts, attrs["num_experts"])
    rows = _apply(_Dispatch, x, order, slots)
    if weights is not None:
        rows = rows * weights.reshape(-1)[order][:, None].to(rows.dtype)
    return rows, order.int(), ends


def _linear(
    products: Products, op: Op, tensors: Sequence[Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    rows, ends, w, *b = tensors
    product = _apply(_Product, rows, ends, w, b[0] if b else None, products)
    return product.to(attrs["dtype"])


def _combine(op: Op, tensors: Sequence[Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    rows, permutation, weights, _ = tensors_of("moe.combine", op, tensors, attrs).values()
    order, slots = _row_order(permutation, attrs["k"])
    return _apply(_Combine, rows, order, slots, weights, attrs["dtype"])


def _last_product(
    products: Products,
    valued: bool,
    op: Op,
    tensors: Sequence[Tensor],
    attrs: Mapping[str, Any],
    run: Runner,
) -> Any:
    inputs = tensors_of("grouped.combine", op, tensors, attrs)
    rows, ends, w, b, permutation, weights = inputs.values()
    order, slots = _row_order(permutation, attrs["k"])
    how = (attrs["dtype"], products, valued)
    return _apply(_LastProduct, rows, ends, w, b, order, slots, weights, *how)


def _row_order(order: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """order[R], slots[T, k]: the choice of each row, and the row of each choice."""
    order = order.long()
    slots = torch.empty_like(order).scatter_(0, order, _numbers(order))
    return order, slots.reshape(-1, k)


def _numbers(order: Tensor) -> Tensor:
    return torch.arange(len(order), device=order.device)


def differentiable(products: Products, *, valued: bool = True) -> Mapping[str, Reference]:
    """The ops of an expanded region with gradients, by name. The region has no bodies and gathers
    fused into its ops yet. With `valued=False` the last product skips its value."""
    return {
        "moe.dispatch": _dispatch,
        "grouped.linear": partial(_linear, products),
        "moe.combine": _combine,
        "grouped.combine": partial(_last_product, products, valued),
    }
