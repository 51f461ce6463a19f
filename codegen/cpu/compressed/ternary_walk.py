"""Reading ternary weights in a kernel: a row of weights is a walk over the entries of codewords.

An entry holds up to 28 weights, as two factors, and their number. masks.py and signs.py define the
factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Self

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.frame import argument
from moec.codegen.cpu.parallel import bytes_of
from moec.codegen.cpu.vector import Vector
from moec.codegen.specs.products import CompressedSpec
from moec.formats.ternary import TOGETHER, bytes_of_counts, starts_shape
from moec.target.cpu import CpuTarget

AHEAD = 16
"""The distance in codewords between the one that is decoded and the one that is prefetched."""

Take = Callable[[int, Expr, Expr, Expr], None]
"""(index of the set of sums, word of x, factor, factor)"""


@dataclass(frozen=True)
class Ternary:
    """stream int16[W], starts uint8[E * n / 32, 36 or 68], grid bfloat16[E, n, 2], and the entries
    of all codewords."""

    stream: Buffer
    starts: Buffer
    grid: Buffer
    table: Buffer
    target: CpuTarget
    turns = 1
    """The number of independent sets of sums."""

    @classmethod
    def of(cls, spec: CompressedSpec, i: int, table: Buffer, target: CpuTarget) -> Self:
        starts = starts_shape(spec.groups * spec.n, spec.bytes_of_counts[i])
        return cls(
            argument(f"stream{i}", (T.int64(),), "int16"),
            argument(f"starts{i}", starts, "uint8"),
            argument(f"grid{i}", (spec.groups, spec.n, 2), "bfloat16"),
            table,
            target,
        )

    def entry(self, code: Expr) -> tuple[Expr, Expr, Expr]:
        """Two factors, and the number of words of x that they cover (int64)."""
        raise NotImplementedError

    def cursor(self, n: int, group: Expr, column: Expr) -> Buffer:
        """int64[1]: the position in the stream of a weight row's first codeword; `each` advances
        it by a row."""
        start = self._counted("row_start", T.bind(group * n + column))
        position = T.alloc_buffer((1,), "int64")
        T.buffer_store(position, start, [0])
        return position

    def each(self, n: int, group: Expr, column: Expr, cursor: Buffer, take: Take) -> None:
        """Calls `take` for each codeword of the weight row at `cursor`, and moves `cursor` to the
        next row."""
        count = T.bind(self._counted("row_words", T.bind(group * n + column)))
        start = T.bind(cursor[0])
        T.buffer_store(cursor, start + count, [0])
        at = T.alloc_buffer((1,), "int64")  # the type of addresses, so that no step extends it
        T.buffer_store(at, T.int64(0), [0])
        # After the end of a row comes the next row, which is decoded soon; the last codewords
        # prefetch nothing beyond the stream.
        within = start + count + AHEAD <= self.stream.shape[0]
        ahead = T.bind(T.Select(within, T.int64(AHEAD), T.int64(0)))

        def one(word: Expr, turn: int) -> None:
            if self._fetches:
                index = [self._code(word + ahead), *[0] * (len(self.table.shape) - 1)]
                Vector(self.target).prefetch(self.table, index)
            here = T.bind(at[0])
            first, second, reach = self.entry(self._code(word))
            take(turn, here, first, second)
            T.buffer_store(at, here + reach, [0])

        turns = self.turns
        rounds = T.bind(T.truncdiv(count, T.int64(turns)))
        with T.serial(0, rounds) as step:
            for turn in range(turns):
                one(T.bind(start + step * turns + turn), turn)
        if turns > 1:
            with T.serial(0, count - rounds * turns) as step:
                one(T.bind(start + rounds * turns + step), 0)

    def _counted(self, what: str, row: Expr) -> Expr:
        """A number about `row` (of all experts' rows) from the table of starts, int64: its
        "row_start" in the stream, or its "row_words", the number of its codewords."""
        inside = T.bind(T.cast(T.truncmod(row, TOGETHER), "int32"))
        where = T.address_of(self.starts[T.truncdiv(row, TOGETHER), 0])
        size = bytes_of_counts([int(size) for size in self.starts.shape])
        return T.cast(T.call_extern("int32", f"moec_{what}_{size}", where, inside), "int64")

    def _code(self, word: Expr) -> Expr:
        return T.bind(T.bitwise_and(T.cast(self.stream[word], "int64"), T.int64(0xFFFF)))

    @property
    def _fetches(self) -> bool:
        """Whether entries are prefetched: not into an L2 cache that the table would fill, which
        holds rows and sums too."""
        table = bytes_of(self.table) * prod(int(size) for size in self.table.shape)
        return self.target.l2 < 2 * table
