"""Ternary weights as a kernel reads them: a row of weights is a walk over the entries of codewords.

An entry tells up to 28 weights, as two factors, and how far they reach. What factors are is told by
masks.py and by signs.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.layout import LinearSpec
from moec.codegen.cpu.product import argument
from moec.codegen.cpu.vector import Vector
from moec.target import Target
from moec.ternary import TOGETHER, bytes_of_counts, starts_shape

AHEAD = 16
"""Codewords between the one that is decoded and the one whose entry is asked for."""

Take = Callable[[int, Expr, Expr, Expr], None]
"""(which set of sums, word of x, factor, factor)"""


@dataclass(frozen=True)
class CompressedSpec(LinearSpec):
    """As LinearSpec, for weights of `kind`; x is integers, and `dtype` says nothing about it."""

    kind: str = "ternary"
    bytes_of_counts: tuple[int, ...] = (1, 1)
    """In the starts of each stack of ternary weights."""


@dataclass(frozen=True)
class Streamed:
    """stream int16[W], starts uint8[E * n / 32, 36 or 68], grid bfloat16[E, n, 2]."""

    stream: Buffer
    starts: Buffer
    grid: Buffer

    @staticmethod
    def of(spec: CompressedSpec, i: int) -> Streamed:
        starts = starts_shape(spec.groups * spec.n, spec.bytes_of_counts[i])
        return Streamed(
            argument(f"stream{i}", (T.int64(),), "int16"),
            argument(f"starts{i}", starts, "uint8"),
            argument(f"grid{i}", (spec.groups, spec.n, 2), "bfloat16"),
        )


def first_word(weights: Streamed, place: Expr) -> Buffer:
    """Where the codewords of row `place` of all rows start: a number that `walk` moves on."""
    inside = T.bind(T.cast(T.truncmod(place, TOGETHER), "int32"))
    where = T.address_of(weights.starts[T.truncdiv(place, TOGETHER), 0])
    start = T.call_extern("int32", f"moec_row_start_{_size(weights)}", where, inside)
    made = T.alloc_buffer((1,), "int64")
    T.buffer_store(made, T.cast(start, "int64"), [0])
    return made


def walk(
    weights: Streamed,
    table: Buffer,
    target: Target,
    place: Expr,
    cursor: Buffer,
    turns: int,
    take: Callable[[int, Expr, Expr], Expr],
) -> None:
    """Calls `take(turn, word of x, code)` for the codewords of row `place` of all rows, which
    returns how many words of x that one reaches, an int64. `cursor` stands at the row's start, and
    is left at that of the next one."""
    inside = T.bind(T.cast(T.truncmod(place, TOGETHER), "int32"))
    where = T.address_of(weights.starts[T.truncdiv(place, TOGETHER), 0])
    words = T.call_extern("int32", f"moec_row_words_{_size(weights)}", where, inside)
    count = T.bind(T.cast(words, "int64"))
    start = T.bind(cursor[0])
    T.buffer_store(cursor, start + count, [0])
    at = T.alloc_buffer((1,), "int64")  # as addresses are, so that none is widened
    T.buffer_store(at, T.int64(0), [0])
    # A second-level cache that the table would fill holds rows and sums too. Behind a row's end is
    # the next one, which is soon decoded; the last ones ask for nothing that is not decoded now.
    fetches = target.l2 < 2 * _bytes(table)
    size = weights.stream.shape[0]
    ahead = T.bind(T.Select(start + count + AHEAD <= size, T.int64(AHEAD), T.int64(0)))

    def code(word: Expr) -> Expr:
        return T.bind(T.bitwise_and(T.cast(weights.stream[word], "int64"), T.int64(0xFFFF)))

    def one(word: Expr, turn: int) -> None:
        if fetches:
            asked = [code(word + ahead), *[0] * (len(table.shape) - 1)]
            Vector(target).prefetch(table, asked)
        here = T.bind(at[0])
        T.buffer_store(at, here + take(turn, here, code(word)), [0])

    whole = T.bind(T.truncdiv(count, T.int64(turns)))
    with T.serial(0, whole) as step:
        for turn in range(turns):
            one(T.bind(start + step * turns + turn), turn)
    if turns > 1:
        with T.serial(0, count - whole * turns) as step:
            one(T.bind(start + whole * turns + step), 0)


def _size(weights: Streamed) -> int:
    """Bytes of the number of a row's codewords."""
    return bytes_of_counts([int(size) for size in weights.starts.shape])


def _bytes(table: Buffer) -> int:
    size = 1 if str(table.dtype) == "int8" else 8
    for extent in table.shape:
        size *= int(extent)
    return size
