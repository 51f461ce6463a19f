"""Ops that read at computed positions. Every position is clamped before memory is read."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import sympy
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.codegen.loops import index as ix
from moec.codegen.loops import scalars as sc
from moec.codegen.loops.axes import wrap
from moec.codegen.loops.emission import Emission, Point
from moec.codegen.loops.index import Index, Position
from moec.codegen.loops.moves.join import branch
from moec.codegen.loops.rules import point
from moec.codegen.loops.scalars import Scalar
from moec.ir.graph import Value
from moec.ir.sizes.dims import Dim, product, symbol, symbols


def looked_up(e: Emission, ids: Value, at: Position, size: Dim) -> Index:
    """The position in `ids`: counted from the end if negative, and clamped to the axis."""
    raw = e.bind_expr(sc.cast(e.read(ids, at), "i64").expr)
    limit = e.sizes.index(size)
    wrapped = e.bind_expr(T.Select(raw < 0, raw + limit.expr, raw))
    key = ("at", ids, tuple(i.key for i in at))
    clamp = ix.bounded(Index(wrapped, key, None, None), limit)
    return Index(e.bind_expr(clamp.expr), clamp.key, clamp.low, clamp.high)


def _read(p: Point, value: Value, at: Position, axes: Sequence[int]) -> Scalar:
    """The element at a position whose `axes` were looked up; 0 where one of them is empty, so that
    memory outside of the table is not read."""
    sizes = [value.shape[axis] for axis in axes]
    empty = [p.size(size).expr > 0 for size in sizes if _may_be_empty(p, size)]
    if not empty:
        return p.read(value, at)
    zero = sc.constant(0, value.dtype)
    return branch(p, functools.reduce(tirx.And, empty), lambda: p.read(value, at), lambda: zero)


def _may_be_empty(p: Point, size: Dim) -> bool:
    """Whether an axis of `size` may be empty while the output has elements."""
    low = p.size(size).low
    if low is not None and low > 0:
        return False
    names, count = symbols(size), sympy.sympify(product(p.shape))
    factors = sympy.Mul.make_args(sympy.sympify(size))
    multiple = all(factor.is_Symbol or factor.is_Integer for factor in factors)
    return not (multiple and names and all(count.subs(symbol(name), 0) == 0 for name in names))


@point("embedding", cost=2, same_position=False, exact=True)
def embedding(p: Point) -> Scalar:
    table = p["weight"]
    row = looked_up(p.emission, p["indices"], p.at[:-1], table.shape[0])
    return _read(p, table, (row, p.at[-1]), [0])


@point("gather", cost=2, same_position=False, exact=True)
def gather(p: Point) -> Scalar:
    value = p["self"]
    if not value.shape:
        return p.read(value, ())
    axis = wrap(p["dim"], len(value.shape))
    position = looked_up(p.emission, p["index"], p.at, value.shape[axis])
    return _read(p, value, (*p.at[:axis], position, *p.at[axis + 1 :]), [axis])


@point("index_select", cost=2, same_position=False, exact=True)
def index_select(p: Point) -> Scalar:
    value = p["self"]
    if not value.shape:
        return p.read(value, ())
    axis = wrap(p["dim"], len(value.shape))
    ids = p["index"]
    inner = (p.at[axis],) if ids.shape else ()
    position = looked_up(p.emission, ids, inner, value.shape[axis])
    return _read(p, value, (*p.at[:axis], position, *p.at[axis + 1 :]), [axis])


@point("take", cost=2, same_position=False, exact=True)
def take(p: Point) -> Scalar:
    value = p["self"]
    flat = looked_up(p.emission, p["index"], p.at, product(value.shape))
    at: list[Index] = []
    for dim in reversed(value.shape):
        at.append(ix.mod(flat, p.size(dim)))
        flat = ix.div(flat, p.size(dim))
    return _read(p, value, tuple(reversed(at)), range(len(value.shape)))


@point("take_along_dim", cost=2, same_position=False, exact=True)
def take_along(p: Point) -> Scalar:
    value, ids = p["self"], p["indices"]
    axis = wrap(p["dim"], len(value.shape))
    at = p.emission.position(ids, p.at, p.shape)
    position = looked_up(p.emission, ids, at, value.shape[axis])
    value_at = p.emission.position(value, p.at, p.shape)
    return _read(p, value, (*value_at[:axis], position, *value_at[axis + 1 :]), [axis])


def indexed_axes(indices: Sequence[Value | None], rank: int) -> tuple[list[int], int, int]:
    """For x[indices]: the indexed axes, the position of the axes that replace them, and their
    number."""
    axes = [axis for axis, ids in enumerate(indices) if ids is not None]
    width = max(len(ids.shape) for ids in indices if ids is not None)
    together = axes == list(range(axes[0], axes[-1] + 1))
    return axes, axes[0] if together else 0, width


@point("index.Tensor", "_unsafe_index.Tensor", cost=2, same_position=False, exact=True)
def index(p: Point) -> Scalar:
    value, indices = p["self"], p["indices"]
    axes, lead, width = indexed_axes(indices, len(value.shape))
    block, rest = p.at[lead : lead + width], list((*p.at[:lead], *p.at[lead + width :]))
    shape = p.shape[lead : lead + width]
    at: list[Index] = []
    for axis, dim in enumerate(value.shape):
        if axis in axes:
            ids = indices[axis]
            inner = p.emission.position(ids, block, shape)
            at.append(looked_up(p.emission, ids, inner, dim))
        else:
            at.append(rest.pop(0))
    return _read(p, value, tuple(at), axes)
