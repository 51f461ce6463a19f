"""Ops that write at computed positions: a copy of the input, then the writes one after another.

The fixed order makes results deterministic: of two writes to one position the later one wins, and
sums always have the same order. Positions outside the output are not written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.loops import scalars as sc
from moec.codegen.loops.arithmetic import larger, plus, times
from moec.codegen.loops.axes import wrap
from moec.codegen.loops.emission import Emission
from moec.codegen.loops.index import Index, Position
from moec.codegen.loops.lookup import indexed_axes
from moec.codegen.loops.rules import kernel
from moec.codegen.loops.scalars import Scalar
from moec.ir.dims import Dim
from moec.ir.graph import Op, Value

Join = Callable[[Scalar, Scalar], Scalar]


def _replace(old: Scalar, new: Scalar) -> Scalar:
    return new


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


def _write(e: Emission, out: Value, at: Position, inside: Expr, x: Scalar, join: Join) -> None:
    with T.If(inside), T.Then(), e.scope():
        if join is _replace:
            e.store(out, at, x)
        else:
            old = sc.load(e.outputs[out], [i.expr for i in at], out.dtype)
            e.store(out, at, sc.rounded(join(old, x)))


def _joining(op: Op, named: dict[str, object]) -> Join:
    kind = named.get("reduce")
    if op.name == "aten.scatter_add.default" or kind in ("add", "sum"):
        return plus
    if kind in ("multiply", "prod"):
        return times
    if kind == "amax":
        return larger
    if kind == "amin":
        return lambda a, b: larger(a, b, -1)
    return _replace


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
    if not out.shape:
        source: Any = named.get("src", named.get("value"))
        with e.alone():
            x = e.read(source, ()) if isinstance(source, Value) else sc.constant(source, out.dtype)
            _write(e, out, (), tirx.const(True, "bool"), x, join)
        return
    axis = wrap(named["dim"], len(out.shape))

    def body(at: Position) -> None:
        position, inside = _target_position(e, ids, at, out.shape[axis])
        source: Any = named.get("src", named.get("value"))
        if isinstance(source, Value):
            x = sc.cast(e.read(source, at if source.shape else ()), out.dtype)
        else:
            x = sc.constant(source, out.dtype)
        _write(e, out, (*at[:axis], position, *at[axis + 1 :]), inside, x, join)

    with e.alone():
        e.serially(ids.shape, body, "write")


@kernel("index_put", "_unsafe_index_put", "_index_put_impl", fuses=("self",))
def index_put(e: Emission, op: Op) -> None:
    named = e.named(op)
    out, indices, values = op.outputs[0], named["indices"], named["values"]
    join = plus if named["accumulate"] else _replace
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

    def body(at: Position) -> None:
        inner, others = at[lead : lead + width], list((*at[:lead], *at[lead + width :]))
        to: list[Index] = []
        inside: Expr = tirx.const(True, "bool")
        for axis, dim in enumerate(out.shape):
            if axis not in axes:
                to.append(others.pop(0))
                continue
            ids = indices[axis]
            there, fits = _target_position(e, ids, e.position(ids, inner, block), dim)
            to.append(there)
            inside = tirx.And(inside, fits)
        x = sc.cast(e.read(values, e.position(values, at, shape)), out.dtype)
        _write(e, out, tuple(to), inside, x, join)

    with e.alone():
        e.serially(shape, body, "write")


@kernel(
    "index_add", "index_copy", "index_fill.int_Scalar", "index_fill.int_Tensor", fuses=("self",)
)
def index_add(e: Emission, op: Op) -> None:
    named = e.named(op)
    out, ids = op.outputs[0], named["index"]
    axis = wrap(named["dim"], len(out.shape))
    join = plus if op.name == "aten.index_add.default" else _replace
    source: Any = named.get("source", named.get("value"))
    _copied(e, op)
    number = ids.shape[0] if ids.shape else 1
    shape = (*out.shape[:axis], number, *out.shape[axis + 1 :])

    def body(at: Position) -> None:
        there, inside = _target_position(e, ids, (at[axis],) if ids.shape else (), out.shape[axis])
        if not isinstance(source, Value):
            x = sc.constant(source, out.dtype)
        else:
            x = sc.cast(e.read(source, at if source.shape else ()), out.dtype)
        if named.get("alpha", 1) != 1:
            x = times(x, sc.constant(named["alpha"], out.dtype))
        _write(e, out, (*at[:axis], there, *at[axis + 1 :]), inside, x, join)

    with e.alone():
        e.serially(shape, body, "write")


@kernel("bincount")
def bincount(e: Emission, op: Op) -> None:
    named = e.named(op)
    out, ids, weights = op.outputs[0], named["self"], named["weights"]
    e.elements(out.shape, lambda at: e.store(out, at, sc.constant(0, out.dtype)))

    def body(at: Position) -> None:
        position, inside = _target_position(e, ids, at, out.shape[0])
        one = sc.constant(1, out.dtype)
        x = one if weights is None else sc.cast(e.read(weights, at), out.dtype)
        _write(e, out, (position,), inside, x, plus)

    with e.alone():
        e.serially(ids.shape, body, "write")


@kernel("histc")
def histc(e: Emission, op: Op) -> None:
    """Counts in bins of equal width between two limits; the upper limit belongs to the last bin."""
    named = e.named(op)
    out, x = op.outputs[0], named["self"]
    low, high, bins = float(named["min"]), float(named["max"]), int(named["bins"])
    e.elements(out.shape, lambda at: e.store(out, at, sc.constant(0, out.dtype)))

    def body(at: Position) -> None:
        value = sc.cast(e.read(x, at), "f32").expr
        inside = tirx.And(value >= T.float32(low), value <= T.float32(high))
        share = (value - T.float32(low)) * T.float32(bins) / T.float32(high - low)
        offset = T.Select(inside, share, T.float32(0.0))
        bucket = tirx.min(T.cast(offset, "int64"), tirx.const(bins - 1, "int64"))
        there = Index(e.bind_expr(bucket), ("bin", tuple(i.key for i in at)))
        _write(e, out, (there,), inside, sc.constant(1, out.dtype), plus)

    with e.alone():
        e.serially(x.shape, body, "write")
