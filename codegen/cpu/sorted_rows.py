"""Rows sorted by expert: which row of x each one is, and who computes it.

The threads share out pairs of an expert and one or some tiles, tiles outermost: whatever the
routing, each thread gets every expert's rows for its share of the columns, so the load is even
without any planning.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.tile import Tile
from moec.codegen.cpu.vector import Vector


def token_of(order: Buffer | None, top_k: int | None) -> Callable[[Expr], Expr]:
    """Row r is row order[r] // top_k of x; without an order, row r."""

    def token(row: Expr) -> Expr:
        return row if order is None else T.cast(T.truncdiv(order[row], top_k), "int64")

    return token


def scale_of(
    v: Vector, scale: Buffer | None, order: Buffer | None, top_k: int | None
) -> Callable[[Expr], Expr] | None:
    """What multiplies row r: scale[T, top_k] of its choice, in float32."""
    if scale is None or order is None:
        return None
    token = token_of(order, top_k)

    def row_scale(row: Expr) -> Expr:
        return v.scalar(scale, [token(row), T.cast(T.truncmod(order[row], top_k), "int64")])

    return row_scale


def each_expert(
    tile: Tile, ends: Buffer, rows: Expr, cleared: bool = True, fetches: bool = False
) -> None:
    """A parallel loop in which expert e gets rows ends[e-1] .. ends[e] of `rows`. Those that no
    expert owns, at the end, become 0 where they are `cleared`, and stay unwritten otherwise.
    Where it `fetches`, the tile is told whose weights come next."""
    experts, tiles, at_once = tile.layout.spec.groups, tile.layout.tiles, tile.tiles_at_once
    units = -(-tiles // at_once) * experts
    with T.parallel(0, units) as unit:
        column = T.bind(T.truncdiv(unit, experts) * at_once)
        some = T.bind(T.min(at_once, tiles - column)) if at_once > 1 else 1
        e = T.bind(T.truncmod(unit, experts))
        before = T.if_then_else(e > 0, ends[T.max(e - 1, 0)], 0)
        first = T.bind(T.cast(before, "int64"))
        end = T.bind(T.cast(ends[e], "int64"))
        with T.If(first < end), T.Then():
            following = None
            if fetches:
                after = T.bind(T.min(unit + 1, units - 1))
                following = (T.truncmod(after, experts), T.truncdiv(after, experts))
            tile.rows(e, column, first, end - first, following, some)
        if cleared:
            with T.If(e == experts - 1), T.Then(), T.serial(0, some) as t:
                tile.zero_rows(column + t, end, rows - end)
