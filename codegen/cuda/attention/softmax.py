"""The softmax of scores in the registers of a warp, one tile of keys after the other.

A thread has two neighbouring scores of each 8 keys, for two rows per fragment of 16; four
neighbouring lanes share a row (PTX ISA, mma.m16n8k16, the sums). Exponentials are in base 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.attention.arguments import LOWEST
from moec.codegen.cuda.attention.key_tiles import KeyTile
from moec.codegen.cuda.instructions import exp2, shuffle_xor

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Softmax:
    """What a thread keeps: scores, then weights, of a tile of keys; the sums of weighted values of
    `width` features; per row the greatest score, and its part of the sum of weights."""

    tile: KeyTile
    width: int
    lane: Expr
    scores: Buffer
    out: Buffer
    top: Buffer
    total: Buffer

    @property
    def rows(self) -> int:
        return self.tile.fragments * 2

    def each(self, key: Expr, body: Callable[[Expr, Expr, Expr], Expr]) -> None:
        """score = body(score, row, key) for each score of this thread; `key` is the tile's
        first."""
        first = T.bind(key + self.lane % 4 * 2)
        with T.unroll(self.rows) as row, each_of_row(row, self.tile.keys) as (at, column):
            T.buffer_store(self.scores, body(self.scores[at], row, first + column), [at])

    def add(self) -> None:
        """Scores become weights; all sums are rescaled to the greatest score."""
        with T.unroll(self.rows) as row:
            best = T.alloc_buffer((1,), "float32", scope="local")
            T.buffer_store(best, self.top[row], [0])
            with each_of_row(row, self.tile.keys) as (at, _):
                T.buffer_store(best, _greater(best[0], self.scores[at]), [0])
            for step in (1, 2):
                T.buffer_store(best, _greater(best[0], shuffle_xor(best[0], step)), [0])
            # If no key was visible so far, the weights are exp2(-inf - 0) = 0.
            limit = T.if_then_else(best[0] == T.float32(LOWEST), T.float32(0), best[0])
            limit = T.bind(limit)
            rescale = T.bind(exp2(self.top[row] - limit))
            T.buffer_store(self.top, best[0], [row])
            T.buffer_store(self.total, self.total[row] * rescale, [row])
            with each_of_row(row, self.tile.keys) as (at, _):
                T.buffer_store(self.scores, exp2(self.scores[at] - limit), [at])
                T.buffer_store(self.total, self.total[row] + self.scores[at], [row])
            with each_of_row(row, self.width) as (at, _):
                T.buffer_store(self.out, self.out[at] * rescale, [at])

    def weight_sum(self, row: Expr) -> Expr:
        """The sum of all weights of a row."""
        total = self.total[row]
        for step in (1, 2):
            total = T.bind(total + shuffle_xor(total, step))
        return total


def divisor_of(total: Expr) -> Expr:
    """A sum of weights; 1 if no key is visible."""
    return T.bind(T.if_then_else(total == T.float32(0), T.float32(1), total))


def softmax(tile: KeyTile, width: int, lane: Expr, sink: Callable[[Expr], Expr] | None) -> Softmax:
    """Without keys so far; sink(row) is a logit without a value, in base 2."""

    def local(size: int) -> Buffer:
        return T.alloc_buffer((size,), "float32", scope="local")

    rows = tile.fragments * 2
    scores, out = local(rows * tile.keys // 4), local(rows * width // 4)
    top, total = local(rows), local(rows)
    with T.unroll(rows * width // 4) as i:
        T.buffer_store(out, T.float32(0), [i])
    with T.unroll(rows) as row:
        T.buffer_store(top, T.float32(LOWEST) if sink is None else sink(row), [row])
        # One of the four lanes of a row counts the sink.
        first = T.float32(1) if sink is not None else T.float32(0)
        T.buffer_store(total, T.if_then_else(lane % 4 == 0, first, T.float32(0)), [row])
    return Softmax(tile, width, lane, scores, out, top, total)


@contextmanager
def each_of_row(row: Expr, columns: int) -> Iterator[tuple[Expr, Expr]]:
    """A loop over this thread's sums of a row of `columns` columns: (index of the sum, column after
    the first)."""
    with T.unroll(columns // 8) as u, T.unroll(2) as i:
        yield first_of_row(row, columns) + u * 4 + i, u * 8 + i


def first_of_row(row: Expr, columns: int) -> Expr:
    return row // 2 * (columns // 2) + row % 2 * 2


def _greater(a: Expr, b: Expr) -> Expr:
    return T.call_extern("float32", "fmaxf", a, b)
