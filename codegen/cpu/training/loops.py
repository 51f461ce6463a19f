"""Loops that kernels with unpacked matrices share: over pieces of work, and at the end of rows.

A piece is a few columns or rows of one expert's matrix. The threads share all pieces of all
experts, with pieces as the outer loop, so that each gets some of every expert's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu import parallel
from moec.codegen.cpu.gemm.row_blocks import ceildiv
from moec.codegen.cpu.training.tile import Mixture
from moec.codegen.cpu.vector import Vector
from moec.target.cpu import CpuTarget

TILES = 8  # of columns that a thread takes at once


@dataclass(frozen=True)
class MatrixStack:
    """Matrices w[experts, n, k] of `dtype`: float32, bfloat16 or float16."""

    experts: int
    n: int
    k: int
    dtype: str

    def paired(self, target: CpuTarget) -> bool:
        """Whether bf16 is multiplied in pairs: all pairs, and all vectors of them, are whole."""
        lanes = target.vector_lanes
        aligned = self.k % (2 * lanes) == 0 and self.n % lanes == 0
        return self.dtype == "bfloat16" and target.bf16_dot and aligned


@dataclass(frozen=True)
class ExpertPiece:
    """A unit of work: piece number `piece` of one expert's matrix, for rows first .. end."""

    expert: Expr
    piece: Expr
    first: Expr
    end: Expr


@contextmanager
def each_piece(
    stack: MatrixStack, ends: Buffer, rows: Expr, pieces: int, written: bool = False
) -> Iterator[ExpertPiece]:
    """A parallel loop over the pieces of all experts; the matrices are read, or `written`."""
    experts = stack.experts
    matrices = T.int64(experts) if written else T.min(rows, T.int64(experts))
    traffic = matrices * (stack.n * stack.k * (4 if stack.dtype == "float32" else 2))
    sums = rows * (stack.n * stack.k)
    with parallel.parallel_for(pieces * experts, sums, traffic) as unit:
        e = T.bind(T.truncmod(unit, experts))
        before = T.if_then_else(e > 0, ends[T.max(e - 1, 0)], 0)
        first, end = T.bind(T.cast(before, "int64")), T.bind(T.cast(ends[e], "int64"))
        yield ExpertPiece(e, T.bind(T.truncdiv(unit, experts)), first, end)


def chunks(span: ExpertPiece, most: int, body: Callable[[Expr, Expr], None]) -> None:
    """`body(base, count)` for the expert's rows, at most `most` at a time."""
    rows = T.bind(span.end - span.first)
    with T.serial(0, ceildiv(rows, most)) as chunk:
        base = T.bind(span.first + chunk * most)
        body(base, T.bind(T.min(span.end - base, T.int64(most))))


def zero_unowned_rows(
    span: ExpertPiece, stack: MatrixStack, rows: Expr, clear: Callable[[Expr], None]
) -> None:
    """`clear(row)` for the rows after those of the last expert."""
    with T.If(span.expert == stack.experts - 1), T.Then():
        with T.serial(0, rows - span.end) as i:
            clear(T.bind(span.end + i))


def pieces(tile: Mixture, k: int) -> int:
    return -(-k // (TILES * tile.columns))


def columns_of(tile: Mixture, k: int, piece: Expr, body: Callable[[Expr, Expr, int], None]) -> None:
    """`body(tile of the piece, first column, columns)` for the tiles of a piece of rows."""
    full_tiles, rest = divmod(k, tile.columns)
    first = T.bind(piece * TILES)
    with T.serial(0, T.min(T.int64(TILES), full_tiles + (rest > 0) - first)) as t:
        column = T.bind((first + t) * tile.columns)
        if not rest:
            body(t, column, tile.columns)
            return
        with T.If(first + t < full_tiles):
            with T.Then():
                body(t, column, tile.columns)
            with T.Else():
                body(t, column, rest)


def put(v: Vector, y: Buffer, where: list[Expr | int], count: int, sums: list[Expr]) -> None:
    """Store one vector of sums, or two, of even and of odd columns."""
    if len(sums) == 2:
        v.store_columns(y, where, *sums)
    elif count == v.lanes:
        v.store(y, where, sums[0])
    else:
        v.store_tail(y, where, sums[0], T.int32(count))


def zero(v: Vector, y: Buffer, where: list[Expr | int], columns: int) -> None:
    *row, first = where
    for start in range(0, columns, v.lanes):
        put(v, y, [*row, first + start], min(v.lanes, columns - start), [v.splat(0.0)])


def plus(v: Vector, sums: list[Expr], b: Buffer, where: list[Expr | int], count: int) -> list[Expr]:
    """`sums` in the form that `put` takes, plus `count` elements of `b`."""
    if len(sums) == 2:
        words = v.words(b, where)
        added = [v.low(words), v.high(words)]
    else:
        added = [v.load(b, where) if count == v.lanes else v.load_tail(b, where, count)]
    return [v.bind(one + more) for one, more in zip(sums, added, strict=True)]


def existing(v: Vector, column: Expr, n: int, width: int) -> Iterator[tuple[int, int]]:
    """Offsets and counts of the vectors of `width` columns, each inside an `If` that it exists."""
    for j in range(0, width, v.lanes):
        if n % width == 0:
            yield j, v.lanes
            continue
        with T.If(column + (j + v.lanes) <= n), T.Then():
            yield j, v.lanes
        if rest := n % v.lanes:
            with T.If(T.And(column + j < n, column + (j + v.lanes) > n)), T.Then():
                yield j, rest
