"""The arguments of a kernel that hold compressed weights, in the form that suits its target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.frame import argument
from moec.codegen.cpu.llvm.masks import LANES
from moec.codegen.cpu.parallel import bytes_of
from moec.codegen.cpu.vector import Vector
from moec.codegen.specs.products import CompressedSpec
from moec.ir.formats.ternary import TOGETHER, bytes_of_counts, starts_shape
from moec.ir.formats.ternary_code import CODEWORDS, SIGNED, dictionary, masks, signs
from moec.target.cpu import CpuTarget


def call(v: Vector, dtype: str, name: str, *args: Expr) -> Expr:
    return T.call_extern(dtype, f"moec_{name}_{v.lanes}", *args)


def dot_pairs(v: Vector, sums: Expr, x: Expr, w: Expr) -> Expr:
    """int32x16: `sums` and the dot products of pairs of 16-bit integers."""
    return call(v, f"int32x{LANES}", "dot_pairs", sums, x, w)


def total(v: Vector, sums: Expr) -> Expr:
    """The sum of the 16 lanes."""
    return T.bind(call(v, "int32", "lanes_total", T.bind(sums)))


def zero(buffer: Buffer) -> None:
    T.buffer_store(buffer, T.broadcast(T.int32(0), LANES), [T.ramp(0, 1, LANES)])


# Reading ternary weights in a kernel: a row of weights is a walk over the entries of codewords.
#
# An entry holds up to 28 weights, as two factors, and their number. Masks and Signs define
# the factors.

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


# Ternary weights as pairs of masks.
#
# The entry of a codeword is two masks of up to 28 weights and their length
# (formats/ternary_code.py). The 32 corresponding elements of x are one vector of 16-bit integers: a
# mask selects some of them, and one instruction adds the selected ones to a sum.


@dataclass(frozen=True)
class Masks(Ternary):
    """Ternary weights as two masks: where they are the row's least, and where its greatest. `table`
    is int64[65536]."""

    turns = 2  # an addition to a sum waits for the previous addition to it

    def entry(self, code: Expr) -> tuple[Expr, Expr, Expr]:
        entry = T.bind(self.table[code])
        upper = T.bind(T.cast(T.shift_right(entry, T.int64(32)), "int32"))
        b = T.bind(T.bitwise_and(upper, T.int32(0x0FFFFFFF)))
        reach = T.bitwise_and(T.shift_right(entry, T.int64(60)), T.int64(15))
        return T.bind(T.cast(entry, "int32")), b, reach

    def add(self, v: Vector, sums: Expr, x: Expr, factor: Expr) -> Expr:
        """int32x16: `sums` plus those of the 32 integers at address `x` that the mask selects."""
        return call(v, f"int32x{LANES}", "masked_sum", sums, x, factor)

    def expand(self, v: Vector, where: Expr, factor: Expr) -> None:
        """Write 32 16-bit integers: 1 where the mask's bit is set, else 0."""
        T.evaluate(call(v, "int32", "expand_mask", where, factor))

    @staticmethod
    def value(least: Expr, greatest: Expr, a: Expr, b: Expr) -> Expr:
        return least * T.cast(a, "float32") + greatest * T.cast(b, "float32")


# Ternary weights as bytes -1, 0 and 1, for targets without an instruction that expands masks.
#
# An entry is 28 bytes and their number (formats/ternary_code.py). They become 16-bit integers,
# which one instruction multiplies with elements of x and adds in pairs. The first factor is the
# signs, the second their magnitudes: for the sums S and U of x under them,
#
#     U + S = 2 B, U - S = 2 A,  B the sum of x where weights are their row's greatest, A the least
#
# Entries are four times as large as masks; all codewords take 2 MiB.
def signed(target: CpuTarget) -> bool:
    """Whether kernels for `target` take signs rather than masks."""
    return target.vector_lanes < LANES


@dataclass(frozen=True)
class Signs(Ternary):
    """`table` int8[65536, 32]. A row has four vectors of sums, which are used in turn."""

    def entry(self, code: Expr) -> tuple[Expr, Expr, Expr]:
        v, kind = Vector(self.target), f"int32x{LANES}"
        where = T.address_of(self.table[code, 0])
        signs = T.bind(call(v, kind, "signs", where))
        magnitudes = T.bind(call(v, kind, "magnitudes", signs))
        return signs, magnitudes, call(v, "int64", "reach", where)

    def add(self, v: Vector, sums: Expr, x: Expr, factor: Expr) -> Expr:
        """int32x16: `sums` plus the products of the factor with the 32 integers at address `x`,
        added in pairs."""
        return call(v, f"int32x{LANES}", "signed_sum", sums, x, factor)

    def expand(self, v: Vector, where: Expr, factor: Expr) -> None:
        """Write the 32 integers of 16 bits."""
        T.evaluate(call(v, "int32", "expand_signs", where, factor))

    @staticmethod
    def value(least: Expr, greatest: Expr, s: Expr, u: Expr) -> Expr:
        # Computed as a mean, since the sum may overflow 32 bits.
        half = T.shift_right(T.bitwise_xor(u, s), T.int32(1))
        b = T.bind(T.bitwise_and(u, s) + half)
        return least * T.cast(u - b, "float32") + greatest * T.cast(b, "float32")


Weights = Masks | Signs


def weights(spec: CompressedSpec, target: CpuTarget) -> tuple[Weights, ...]:
    """The arguments that hold the one stack of `spec`, or the two of a gated one."""
    halves = range(1 + spec.gated)
    if signed(target):
        entries = argument("signs", (CODEWORDS, SIGNED), "int8")
        return tuple(Signs.of(spec, i, entries, target) for i in halves)
    entries = argument("masks", (CODEWORDS,), "int64")
    return tuple(Masks.of(spec, i, entries, target) for i in halves)


def table(target: CpuTarget) -> npt.NDArray[Any]:
    """The one dictionary as an argument of kernels for `target`: 512 KiB of masks, or 2 MiB of
    signs."""
    entries = dictionary().entries
    return signs(entries) if signed(target) else masks(entries).view(np.int64)
