"""Rows sorted by expert: the row of x of each, and the division of the work among threads.

The threads share pairs of an expert and one or more tiles, with tiles as the outer loop: for any
routing, each thread computes every expert's rows for its share of the columns, so the load is even
without planning.

Where experts are on disk, they are the outer loop, in the order of the store's plan: a task waits
until the weights of its expert are in a slot (expert_store.c), and reads that slot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu import parallel
from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.gemm.product import ProductOutput, TileProduct, W, X
from moec.codegen.cpu.gemm.tile import RowRun, Tile
from moec.codegen.cpu.vector import Vector


def sorted_product(
    product: TileProduct[X, W],
    name: str,
    top_k: int = 0,
    scale_dtype: str | None = None,
    zero_unowned_rows: bool = True,
    *,
    from_slots: bool = False,
) -> PrimFunc:
    """A kernel (rows of x[, order i32[R]], ends i32[E][, key i64[2], plan i32[E + 1]], weights[,
    bias packed][, scale[T, top_k]], y[R, n]).

    With `top_k`, row r of y is computed from row order[r] // top_k of the T rows of x; with 0, R is
    T. With `scale_dtype`, `scale` multiplies the row of x of each choice (the product is scaled
    before the bias is added, which is equivalent). `zero_unowned_rows`: see each_expert. With
    `from_slots`, weights and bias are those of experts in slots, any number of them; the key and
    the plan are those of the expert store.
    """
    layout = product.layout
    spec = layout.spec
    with kernel(name, layout.target) as frame:
        t, r = T.int64(), T.int64()
        x = product.rows(t if top_k else r)
        order = argument("order", (r,), "int32") if top_k else None
        ends = argument("ends", (spec.groups,), "int32")
        slots = _slots(spec.groups) if from_slots else None
        groups = spec.groups if slots is None else T.int64()
        w = product.weights("", groups)
        bias = product.bias("", groups)
        scale = argument("scale", (t, top_k), scale_dtype) if scale_dtype and top_k else None
        y = argument("y", (r, spec.n), spec.y_dtype)
        tokens = token_of(order, top_k)
        scales = scale_of(Vector(layout.target), scale, order, top_k)
        tile = product.tile(x, w, ProductOutput(y, bias, tokens, scales, order is not None))
        if slots is None:
            each_expert(tile, ends, r, zero_unowned_rows)
        else:
            each_visit(tile, ends, slots, r, zero_unowned_rows)
    return frame.function


class _Slots(NamedTuple):
    """The arguments by which a kernel finds experts in slots."""

    key: Buffer  # the address of the store, and the number of the stack
    plan: Buffer  # how many experts to visit, then which


def _slots(experts: int) -> _Slots:
    key = argument("key", (2,), "int64")
    return _Slots(key, argument("plan", (experts + 1,), "int32"))


def token_of(order: Buffer | None, top_k: int) -> Callable[[Expr], Expr]:
    """The map from row r to its row of x: order[r] // top_k, or r without an order."""

    def token(row: Expr) -> Expr:
        return row if order is None else T.cast(T.truncdiv(order[row], top_k), "int64")

    return token


def scale_of(
    v: Vector, scale: Buffer | None, order: Buffer | None, top_k: int
) -> Callable[[Expr], Expr] | None:
    """The factor of row r in float32: scale[T, top_k] of its choice; None without scales."""
    if scale is None or order is None:
        return None
    token = token_of(order, top_k)

    def row_scale(row: Expr) -> Expr:
        return v.scalar(scale, [token(row), T.cast(T.truncmod(order[row], top_k), "int64")])

    return row_scale


def each_expert(tile: Tile, ends: Buffer, rows: Expr, zero_unowned_rows: bool = True) -> None:
    """A parallel loop in which expert e gets rows ends[e-1] .. ends[e] of `rows`, if it has any.
    With `zero_unowned_rows`, the rows after the last expert's become 0; else they are not
    written."""
    tiles, at_once = tile.layout.tiles, tile.tiles_at_once
    active, count = _active(tile, ends)
    units = T.bind(count * -(-tiles // at_once))
    weights = T.cast(count, "int64") * tile.layout.bytes
    with parallel.parallel_for(units, rows * tile.layout.sums, weights) as unit:

        def unit_at(unit: Expr) -> tuple[Expr, Expr, Expr]:
            """The index among active experts, the expert, and the first of its tiles."""
            parts = parallel.divide(T.cast(unit, "int64"), T.cast(count, "int64"))
            block, i = (T.bind(T.cast(part, "int32")) for part in parts)
            return i, T.bind(active[i]), T.bind(block * at_once)

        i, e, column = unit_at(unit)
        tile_count = T.bind(T.min(at_once, tiles - column)) if at_once > 1 else 1
        first, end = _bounds(ends, e)
        with T.If(first < end), T.Then():
            _, after, column_after = unit_at(T.min(unit + 1, units - 1))
            following = (after, column_after)
            tile.rows(RowRun(e, column, first, end - first, following, tile_count))
        if zero_unowned_rows:
            with T.If(i == count - 1), T.Then(), T.serial(0, tile_count) as t:
                past = T.bind(T.cast(ends[tile.layout.spec.groups - 1], "int64"))
                tile.zero_rows(column + t, past, rows - past)


def each_visit(
    tile: Tile, ends: Buffer, slots: _Slots, rows: Expr, zero_unowned_rows: bool = True
) -> None:
    """As `each_expert`, for experts in slots, in the order of the plan."""
    tiles, at_once = tile.layout.tiles, tile.tiles_at_once
    blocks = -(-tiles // at_once)
    visits = T.bind(slots.plan[0])
    count = T.bind(T.max(visits, 1))
    weights = T.cast(count, "int64") * tile.layout.bytes
    store = T.bind(slots.key[0])
    stack = T.bind(T.cast(slots.key[1], "int32"))
    with parallel.parallel_for(count * blocks, rows * tile.layout.sums, weights) as unit:
        i = T.bind(T.cast(T.truncdiv(unit, blocks), "int32"))
        column = T.bind(T.cast(T.truncmod(unit, blocks), "int32") * at_once)
        tile_count = T.bind(T.min(at_once, tiles - column)) if at_once > 1 else 1
        first, end = _bounds(ends, T.bind(slots.plan[i + 1]))
        with T.If(i < visits), T.Then():
            slot = T.bind(T.call_extern("int32", "expert_store_wait", store, stack, i))
            with T.If(slot < 0), T.Then():
                T.evaluate(tirx.tvm_throw_last_error())
            group = T.bind(T.cast(slot, "int64"))
            following = (group, T.bind(T.min(column + at_once, tiles - 1)))
            tile.rows(RowRun(group, column, first, end - first, following, tile_count))
            T.evaluate(T.call_extern("int32", "expert_store_done", store, stack, i, blocks))
        if zero_unowned_rows:
            with T.If(i == count - 1), T.Then(), T.serial(0, tile_count) as t:
                past = T.bind(T.cast(ends[tile.layout.spec.groups - 1], "int64"))
                tile.zero_rows(column + t, past, rows - past)


def _active(tile: Tile, ends: Buffer) -> tuple[Buffer, Expr]:
    """The experts that have rows, in the order of the tile, and their number; the first expert if
    none has, so that a task zeroes the rows without an expert."""
    experts = tile.layout.spec.groups
    active = T.alloc_buffer((experts,), "int32")
    count = T.alloc_buffer((1,), "int32")
    T.buffer_store(active, 0, [0])
    T.buffer_store(count, 0, [0])
    with T.serial(0, experts) as number:
        e = T.bind(tile.expert_at(number))
        first, end = _bounds(ends, e)
        with T.If(first < end), T.Then():
            T.buffer_store(active, e, [count[0]])
            T.buffer_store(count, count[0] + 1, [0])
    return active, T.bind(T.max(count[0], 1))


def _bounds(ends: Buffer, e: Expr) -> tuple[Expr, Expr]:
    """The rows of expert e: its first row and the end, int64."""
    before = T.if_then_else(e > 0, ends[T.max(e - 1, 0)], 0)
    return T.bind(T.cast(before, "int64")), T.bind(T.cast(ends[e], "int64"))
