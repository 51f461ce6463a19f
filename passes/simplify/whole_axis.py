"""A scatter to all positions of an axis becomes a constant.

    i = aten.topk(x) <k=T, dim=0>       of x[T, E]: each position of the axis once
    y = aten.scatter(z, i) <value=1>    ->   y = aten.full_like(z) <1>
    m = aten.mul(mask, y)               ->   mask        of integers

This removes a capacity (random token selection, arXiv 2201.05596) that is at least the number of
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from moec.ir.graph import Op, Value
from moec.passes.core.rewrite import Builder

_ORDERS = ("aten.topk.default", "aten.sort.default", "aten.sort.stable", "aten.argsort.default")


def scatter(op: Op, b: Builder) -> Sequence[Value] | None:
    """One number scattered to every position of an axis, in any order, is a constant tensor."""
    x, index = op.inputs
    order = b.producers.get(index)
    if order is None or order.name not in _ORDERS or x.shape != index.shape:
        return None
    rank, number = len(x.shape), op.attrs.get("value")
    written, sorted_by = (int(o.attrs.get("dim", -1)) % rank for o in (op, order))  # type: ignore[arg-type]
    if index is not order.outputs[-1] or written != sorted_by or "reduce" in op.attrs:
        return None
    attrs = {"fill_value": number}
    return b.emit("aten.full_like.default", [x], [op.outputs[0].type], like=op, attrs=attrs)


def is_one(value: Value, b: Builder) -> bool:
    """Whether every element of `value` is 1."""
    op = b.producers.get(value)
    return (
        op is not None
        and op.name in ("aten.full_like.default", "aten.full.default")
        and op.attrs["fill_value"] == 1
    )
