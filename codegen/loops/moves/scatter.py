"""Ops that write at computed positions: a copy of the input, then the writes one after another.

The fixed order makes results deterministic: of two writes to one position the later one wins, and
sums always have the same order. Positions outside the output are not written.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.loops import scalars as sc
from moec.codegen.loops.axes import wrap
from moec.codegen.loops.cells import Writes
from moec.codegen.loops.elements.arithmetic import larger, plus, times
from moec.codegen.loops.emission import Emission
from moec.codegen.loops.index import Index, Position
from moec.codegen.loops.moves.lookup import indexed_axes
from moec.codegen.loops.rules import kernel
from moec.codegen.loops.scalars import Join, Scalar
from moec.ir.graph import Op, Value
from moec.ir.sizes.dims import Dim


def _copied(e: Emission, op: Op) -> None:
    out, source = op.outputs[0], e.named(op)["self"]
    e.elements(out.shape, lambda at: e.store(out, at, e.read(source, at)))


def _target_position(e: Emission, ids: Value, at: Position, size: Dim) -> tuple[Index, Expr]:
    """The position to write, and whether it is inside the output."""
    raw = e.bind_expr(sc.cast(e.read(ids, at), "i64").expr)
    limit = e.sizes.expr(size)
    position = e.bind_expr(T.Select(raw < 0, raw + limit, raw))
    return Index(position, ("to", ids, tuple(i.key for i in at))), tirx.And(
        position >= 0, position < limit
    )


def _joining(op: Op, named: dict[str, object]) -> Join | None:
    kind = named.get("reduce")
    if op.name == "aten.scatter_add.default" or kind in ("add", "sum"):
        return plus
    if kind in ("multiply", "prod"):
        return times
    if kind == "amax":
        return larger
    if kind == "amin":
        return lambda a, b: larger(a, b, -1)
    return None


@kernel(
    "scatter.src",
    "scatter.value",
    "scatter.reduce",
    "scatter.value_reduce",
    "scatter_add",
    "scatter_reduce.two",
    fuses=("self",),
)
def scatter(e: Emission, op: Op) -> None:
    named = dict(e.named(op))
    out, ids = op.outputs[0], named["index"]
    join = _joining(op, named)
    _copied(e, op)
    source: Any = named.get("src", named.get("value"))

    def x(at: Position) -> Scalar:
        if isinstance(source, Value):
            return sc.cast(e.read(source, at if source.shape else ()), out.dtype)
        return sc.constant(source, out.dtype)

    if not out.shape:
        e.writes(Writes(out, (), lambda at: ((), tirx.const(True, "bool")), x, join))
        return
    axis = wrap(named["dim"], len(out.shape))

    def to(at: Position) -> tuple[Position, Expr]:
        position, inside = _target_position(e, ids, at, out.shape[axis])
        return (*at[:axis], position, *at[axis + 1 :]), inside

    e.writes(Writes(out, ids.shape, to, x, join, _other_axes(out, axis)))


@kernel("index_put", "_unsafe_index_put", "_index_put_impl", fuses=("self",))
def index_put(e: Emission, op: Op) -> None:
    named = e.named(op)
    out, indices, values = op.outputs[0], named["indices"], named["values"]
    join = plus if named["accumulate"] else None
    axes, lead, width = indexed_axes(indices, len(out.shape))
    _copied(e, op)
    lists = [ids for ids in indices if ids is not None]
    block: list[Dim] = [1] * width
    for ids in lists:
        for axis, dim in enumerate(ids.shape):
            if dim != 1:
                block[width - len(ids.shape) + axis] = dim
    rest = [dim for axis, dim in enumerate(out.shape) if axis not in axes]
    shape = (*rest[:lead], *block, *rest[lead:])

    def to(at: Position) -> tuple[Position, Expr]:
        inner, others = at[lead : lead + width], list((*at[:lead], *at[lead + width :]))
        indexed: list[Index] = []
        inside: Expr = tirx.const(True, "bool")
        for axis, dim in enumerate(out.shape):
            if axis not in axes:
                indexed.append(others.pop(0))
                continue
            ids = indices[axis]
            there, fits = _target_position(e, ids, e.position(ids, inner, block), dim)
            indexed.append(there)
            inside = tirx.And(inside, fits)
        return tuple(indexed), inside

    def x(at: Position) -> Scalar:
        return sc.cast(e.read(values, e.position(values, at, shape)), out.dtype)

    apart = tuple(axis for axis in range(len(shape)) if not lead <= axis < lead + width)
    e.writes(Writes(out, shape, to, x, join, apart))


@kernel(
    "index_add", "index_copy", "index_fill.int_Scalar", "index_fill.int_Tensor", fuses=("self",)
)
def index_add(e: Emission, op: Op) -> None:
    named = e.named(op)
    out, ids = op.outputs[0], named["index"]
    axis = wrap(named["dim"], len(out.shape))
    join = plus if op.name == "aten.index_add.default" else None
    source: Any = named.get("source", named.get("value"))
    _copied(e, op)
    number = ids.shape[0] if ids.shape else 1
    shape = (*out.shape[:axis], number, *out.shape[axis + 1 :])

    def to(at: Position) -> tuple[Position, Expr]:
        there, inside = _target_position(e, ids, (at[axis],) if ids.shape else (), out.shape[axis])
        return (*at[:axis], there, *at[axis + 1 :]), inside

    def x(at: Position) -> Scalar:
        if not isinstance(source, Value):
            value = sc.constant(source, out.dtype)
        else:
            value = sc.cast(e.read(source, at if source.shape else ()), out.dtype)
        if named.get("alpha", 1) != 1:
            value = times(value, sc.constant(named["alpha"], out.dtype))
        return value

    e.writes(Writes(out, shape, to, x, join, _other_axes(out, axis)))


def _other_axes(out: Value, axis: int) -> tuple[int, ...]:
    return tuple(other for other in range(len(out.shape)) if other != axis)


@kernel("bincount")
def bincount(e: Emission, op: Op) -> None:
    named = e.named(op)
    out, ids, weights = op.outputs[0], named["self"], named["weights"]
    e.elements(out.shape, lambda at: e.store(out, at, sc.constant(0, out.dtype)))

    def to(at: Position) -> tuple[Position, Expr]:
        position, inside = _target_position(e, ids, at, out.shape[0])
        return (position,), inside

    def x(at: Position) -> Scalar:
        one = sc.constant(1, out.dtype)
        return one if weights is None else sc.cast(e.read(weights, at), out.dtype)

    e.writes(Writes(out, ids.shape, to, x, plus))


@kernel("histc")
def histc(e: Emission, op: Op) -> None:
    """Counts in bins of equal width between two limits; the upper limit belongs to the last bin."""
    named = e.named(op)
    out, x = op.outputs[0], named["self"]
    low, high, bins = float(named["min"]), float(named["max"]), int(named["bins"])
    e.elements(out.shape, lambda at: e.store(out, at, sc.constant(0, out.dtype)))

    def to(at: Position) -> tuple[Position, Expr]:
        value = sc.cast(e.read(x, at), "f32").expr
        inside = tirx.And(value >= T.float32(low), value <= T.float32(high))
        share = (value - T.float32(low)) * T.float32(bins) / T.float32(high - low)
        offset = T.Select(inside, share, T.float32(0.0))
        bucket = tirx.min(T.cast(offset, "int64"), tirx.const(bins - 1, "int64"))
        return (Index(e.bind_expr(bucket), ("bin", tuple(i.key for i in at))),), inside

    e.writes(Writes(out, x.shape, to, lambda at: sc.constant(1, out.dtype), plus))
