"""Indexing with a mask becomes indexing with the positions where it is set.

x[mask]       -> x[i, j, ..]   as many as the data say, with i, j, .. the columns of nonzero(mask)
x[mask] = y   -> x[i, j, ..] = y
x.masked_scatter(mask[.., None], y) -> x[i, j, ..] = y   where y has a row for each that is set
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from moec.ir.graph import Attr, Op, Ref, TensorType, Value
from moec.ir.sizes.dims import Dim
from moec.passes.core.rewrite import Builder
from moec.passes.simplify import mask_fill


def index(op: Op, b: Builder) -> Sequence[Value] | None:
    axis = _mask_axis(op, op.inputs[1:])
    if axis is None or mask_fill.is_known(op, b):
        return None
    mask = op.inputs[1]
    rows = _set_positions(mask, op.outputs[0].shape[axis], op, b)
    attrs: dict[str, Attr] = {"indices": _indices(axis, len(rows))}
    return b.emit(op.name, [op.inputs[0], *rows], [op.outputs[0].type], like=op, attrs=attrs)


def put(op: Op, b: Builder) -> Sequence[Value] | None:
    """Rewrites x[mask] = y. A single value for all rows is not rewritten, because the number of
    rows is not known."""
    axis = _mask_axis(op, op.inputs[1:-1])
    x, values = op.inputs[0], op.inputs[-1]
    if axis is None or len(values.shape) != len(x.shape) - len(op.inputs[1].shape) + 1:
        return None
    if values.shape[axis] == 1:
        return None
    rows = _set_positions(op.inputs[1], values.shape[axis], op, b)
    attrs: dict[str, Attr] = {**op.attrs, "indices": _indices(axis, len(rows))}
    return b.emit(op.name, [x, *rows, values], [op.outputs[0].type], like=op, attrs=attrs)


def scatter(op: Op, b: Builder) -> Sequence[Value] | None:
    """Rewrites masked_scatter of values [n, D], where the mask sets all features of n rows."""
    x, mask, values = op.inputs
    rows = _mask_of_rows(mask, x.shape, b)
    if rows is None or len(values.shape) != 2 or values.shape[1:] != x.shape[-1:]:
        return None
    if not any(
        other.name == "aten.nonzero.default"
        and other.inputs[0] is rows
        and other.outputs[0].shape[0] == values.shape[0]
        for other in b.ops
    ):
        return None
    indices = _set_positions(rows, values.shape[0], op, b)
    attrs: dict[str, Attr] = {"indices": _indices(0, len(indices))}
    inputs = [x, *indices, values]
    return b.emit("aten.index_put.default", inputs, [op.outputs[0].type], like=op, attrs=attrs)


def _mask_of_rows(mask: Value, shape: tuple[Dim, ...], b: Builder) -> Value | None:
    """m where mask = m[.., None], which may be expanded along the features."""
    maker = b.producers.get(mask)
    if maker is not None and maker.name == "aten.expand.default":
        mask = maker.inputs[0]
        maker = b.producers.get(mask)
    if mask.shape != (*shape[:-1], 1) or maker is None or maker.name != "aten.reshape.default":
        return None
    rows = maker.inputs[0]
    return rows if rows.shape == shape[:-1] else None


def _mask_axis(op: Op, indices: Sequence[Value]) -> int | None:
    """The axis that a mask selects from, if it is the only index."""
    if len(indices) != 1 or indices[0].dtype != "bool":
        return None
    indices_attr = cast("tuple[Attr, ...]", op.attrs["indices"])
    return next(i for i, ref in enumerate(indices_attr) if ref is not None)


def _indices(axis: int, count: int) -> tuple[Attr, ...]:
    return (*[None] * axis, *(Ref(1 + i) for i in range(count)))


def _set_positions(mask: Value, count: Dim, op: Op, b: Builder) -> list[Value]:
    """i64[count] for each axis of the mask: the positions where it is set, in row-major order."""
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
