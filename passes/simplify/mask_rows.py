"""Indexing with a mask, written as indexing with the rows where it is set.

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
    place = _place(op, op.inputs[1:])
    if place is None:
        return None
    mask = op.inputs[1]
    rows = _rows(mask, op.outputs[0].shape[place], op, b)
    attrs: dict[str, Attr] = {"indices": _indices(place, len(rows))}
    return b.emit(op.name, [op.inputs[0], *rows], [op.outputs[0].type], like=op, attrs=attrs)


def put(op: Op, b: Builder) -> Sequence[Value] | None:
    """One value for all rows is left as it is: nothing tells how many rows there are."""
    place = _place(op, op.inputs[1:-1])
    x, values = op.inputs[0], op.inputs[-1]
    if place is None or len(values.shape) != len(x.shape) - len(op.inputs[1].shape) + 1:
        return None
    if values.shape[place] == 1:
        return None
    rows = _rows(op.inputs[1], values.shape[place], op, b)
    attrs: dict[str, Attr] = {**op.attrs, "indices": _indices(place, len(rows))}
    return b.emit(op.name, [x, *rows, values], [op.outputs[0].type], like=op, attrs=attrs)


def _place(op: Op, indices: Sequence[Value]) -> int | None:
    """The axis from which a mask picks, where it is the only index."""
    if len(indices) != 1 or indices[0].dtype != "bool":
        return None
    places = cast("tuple[Attr, ...]", op.attrs["indices"])
    return next(i for i, ref in enumerate(places) if ref is not None)


def _indices(place: int, count: int) -> tuple[Attr, ...]:
    return (*[None] * place, *(Ref(1 + i) for i in range(count)))


def _rows(mask: Value, count: Dim, op: Op, b: Builder) -> list[Value]:
    """i64[count] for each axis of the mask: where it is set, in row-major order."""
    rank = len(mask.shape)
    wanted = TensorType("i64", (count, rank))
    (found,) = b.emit("aten.nonzero.default", [mask], [wanted], like=op, named="nonzero")
    rows: list[Value] = []
    for axis in range(rank):
        one = found
        if rank > 1:
            column = TensorType("i64", (count, 1))
            attrs: dict[str, Attr] = {"dim": 1, "start": axis, "end": axis + 1}
            (one,) = b.emit("aten.slice.Tensor", [found], [column], like=op, attrs=attrs)
        flat = TensorType("i64", (count,))
        rows += b.emit("aten.reshape.default", [one], [flat], like=op, attrs={"shape": flat.shape})
    return rows
