"""Indexing with a mask becomes indexing with the positions where it is set.

x[mask]       -> x[i, j, ..]        with i, j, .. the columns of nonzero(mask)
x[mask] = y   -> x[i, j, ..] = y
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from moec.ir.dims import Dim
from moec.ir.graph import Attr, Op, Ref, TensorType, Value
from moec.passes.core.rewrite import Builder


def index(op: Op, b: Builder) -> Sequence[Value] | None:
    axis = _mask_axis(op, op.inputs[1:])
    if axis is None:
        return None
    mask = op.inputs[1]
    rows = _set_positions(mask, op.outputs[0].shape[axis], op, b)
    attrs: dict[str, Attr] = {"indices": _indices(axis, len(rows))}
    return b.emit(op.name, [op.inputs[0], *rows], [op.outputs[0].type], like=op, attrs=attrs)


def put(op: Op, b: Builder) -> Sequence[Value] | None:
    """x[mask] = y. One value for all rows is not rewritten, as the number of rows is not known."""
    axis = _mask_axis(op, op.inputs[1:-1])
    x, values = op.inputs[0], op.inputs[-1]
    if axis is None or len(values.shape) != len(x.shape) - len(op.inputs[1].shape) + 1:
        return None
    if values.shape[axis] == 1:
        return None
    rows = _set_positions(op.inputs[1], values.shape[axis], op, b)
    attrs: dict[str, Attr] = {**op.attrs, "indices": _indices(axis, len(rows))}
    return b.emit(op.name, [x, *rows, values], [op.outputs[0].type], like=op, attrs=attrs)


def _mask_axis(op: Op, indices: Sequence[Value]) -> int | None:
    """The axis from which a mask picks, where it is the only index."""
    if len(indices) != 1 or indices[0].dtype != "bool":
        return None
    indices_attr = cast("tuple[Attr, ...]", op.attrs["indices"])
    return next(i for i, ref in enumerate(indices_attr) if ref is not None)


def _indices(axis: int, count: int) -> tuple[Attr, ...]:
    return (*[None] * axis, *(Ref(1 + i) for i in range(count)))


def _set_positions(mask: Value, count: Dim, op: Op, b: Builder) -> list[Value]:
    """i64[count] for each axis of the mask: where it is set, in row-major order."""
    rank = len(mask.shape)
    index_type = TensorType("i64", (count, rank))
    (index,) = b.emit("aten.nonzero.default", [mask], [index_type], like=op, named="nonzero")
    rows: list[Value] = []
    for axis in range(rank):
        one = index
        if rank > 1:
            column = TensorType("i64", (count, 1))
            attrs: dict[str, Attr] = {"dim": 1, "start": axis, "end": axis + 1}
            (one,) = b.emit("aten.slice.Tensor", [index], [column], like=op, attrs=attrs)
        rows.append(b.reshape(one, (count,), like=op))
    return rows
