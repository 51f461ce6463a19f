"""Compressed weights as a kernel reads them: a row of weights is a walk over pairs of masks.

A codeword's entry is two masks of up to 28 weights and how far they reach (ternary_dictionary.py);
a word of two planes is two masks of 32 (two_bits.py). As many neighbours of x are one vector of
16-bit integers: each mask lets some of them through, and one instruction adds those to a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.intrinsics import llvm_functions
from moec.codegen.cpu.layout import LinearSpec
from moec.codegen.cpu.mask_intrinsics import LANES, mask_functions
from moec.codegen.cpu.product import argument
from moec.codegen.cpu.vector import Vector
from moec.target import Target
from moec.ternary import TOGETHER, bytes_of_counts, starts_shape
from moec.ternary_dictionary import CODEWORDS
from moec.two_bits import NEIGHBOURS, words

AHEAD = 16
"""Codewords between the one that is decoded and the one whose entry is asked for."""
TABLE = 8 * CODEWORDS
"""Bytes of all entries."""
UNROLLED = 2
"""Codewords with sums of their own: an addition to a sum waits for the one before."""

Take = Callable[[int, Expr, Expr, Expr], None]
"""(which set of sums, word of x, mask, mask)"""


@dataclass(frozen=True)
class CompressedSpec(LinearSpec):
    """As LinearSpec, for weights of `kind`; x is integers, and `dtype` says nothing about it."""

    kind: str = "ternary"
    bytes_of_counts: tuple[int, ...] = (1, 1)
    """In the starts of each stack of ternary weights."""


@dataclass(frozen=True)
class Ternary:
    """stream int16[W], starts uint8[E * n / 32, 36 or 68], grid bfloat16[E, n, 2]; `table`
    int64[65536]."""

    stream: Buffer
    starts: Buffer
    grid: Buffer
    table: Buffer
    target: Target

    @staticmethod
    def of(spec: CompressedSpec, i: int, table: Buffer, target: Target) -> Ternary:
        starts = starts_shape(spec.groups * spec.n, spec.bytes_of_counts[i])
        return Ternary(
            argument(f"stream{i}", (T.int64(),), "int16"),
            argument(f"starts{i}", starts, "uint8"),
            argument(f"grid{i}", (spec.groups, spec.n, 2), "bfloat16"),
            table,
            target,
        )

    def each(self, n: int, group: Expr, column: Expr, take: Take) -> None:
        """Calls `take` for the codewords of a row of weights."""
        place = T.bind(group * n + column)
        inside = T.bind(T.cast(T.truncmod(place, TOGETHER), "int32"))
        where = T.address_of(self.starts[T.truncdiv(place, TOGETHER), 0])
        size = bytes_of_counts([int(size) for size in self.starts.shape])
        start = T.bind(T.call_extern("int32", f"moec_row_start_{size}", where, inside))
        stop = T.bind(start + T.call_extern("int32", f"moec_row_words_{size}", where, inside))
        at = T.alloc_buffer((1,), "int32")
        T.buffer_store(at, T.int32(0), [0])

        def one(word: Expr, turn: int) -> None:
            if self.fetches:
                ahead = T.bind(T.min(word + AHEAD, stop - 1))
                Vector(self.target).prefetch(self.table, [self._code(ahead)])
            entry = T.bind(self.table[self._code(word)])
            here = T.bind(at[0])
            upper = T.bind(T.cast(T.shift_right(entry, T.int64(32)), "int32"))
            b = T.bind(T.bitwise_and(upper, T.int32(0x0FFFFFFF)))
            take(turn, here, T.bind(T.cast(entry, "int32")), b)
            pairs = T.bitwise_and(T.shift_right(upper, T.int32(28)), T.int32(15))
            T.buffer_store(at, here + pairs, [0])

        whole = T.bind(T.truncdiv(stop - start, UNROLLED))
        with T.serial(0, whole) as step:
            for turn in range(UNROLLED):
                one(start + step * UNROLLED + turn, turn)
        with T.serial(0, stop - start - whole * UNROLLED) as step:
            one(start + whole * UNROLLED + step, 0)

    def _code(self, word: Expr) -> Expr:
        return T.bitwise_and(T.cast(self.stream[word], "int32"), T.int32(0xFFFF))

    @property
    def fetches(self) -> bool:
        """Whether entries are asked for ahead: a second-level cache that the table would fill
        holds rows and sums too."""
        return self.target.l2 < 2 * TABLE

    @staticmethod
    def value(least: Expr, greatest: Expr, a: Expr, b: Expr, total: Expr) -> Expr:
        return least * T.cast(a, "float32") + greatest * T.cast(b, "float32")


@dataclass(frozen=True)
class TwoBits:
    """planes int64[E, n, words], grid bfloat16[E, n, 2]."""

    planes: Buffer
    grid: Buffer

    @staticmethod
    def of(spec: LinearSpec, i: int) -> TwoBits:
        return TwoBits(
            argument(f"planes{i}", (spec.groups, spec.n, words(spec.k)), "int64"),
            argument(f"grid{i}", (spec.groups, spec.n, 2), "bfloat16"),
        )

    def each(self, n: int, group: Expr, column: Expr, take: Take) -> None:
        count = int(self.planes.shape[2])

        def one(word: Expr, turn: int) -> None:
            both = T.bind(self.planes[group, column, word])
            b = T.bind(T.cast(T.shift_right(both, T.int64(32)), "int32"))
            take(turn, word * (NEIGHBOURS // 2), T.bind(T.cast(both, "int32")), b)

        with T.serial(0, count // UNROLLED) as step:
            for turn in range(UNROLLED):
                one(step * UNROLLED + turn, turn)
        for word in range(count // UNROLLED * UNROLLED, count):
            one(T.int32(word), 0)

    @staticmethod
    def value(step: Expr, zero: Expr, a: Expr, b: Expr, total: Expr) -> Expr:
        codes = T.cast(a, "float32") + T.float32(2) * T.cast(b, "float32")
        return step * (codes - zero * T.cast(total, "float32"))


Weights = Ternary | TwoBits


def weights(spec: CompressedSpec, target: Target) -> tuple[Weights, ...]:
    """The arguments that hold the one stack of `spec`, or the two of a gated one."""
    halves = range(1 + spec.gated)
    if spec.kind == "2bit":
        return tuple(TwoBits.of(spec, i) for i in halves)
    table = argument("masks", (CODEWORDS,), "int64")
    return tuple(Ternary.of(spec, i, table, target) for i in halves)


def call(v: Vector, dtype: str, name: str, *args: Expr) -> Expr:
    return T.call_extern(dtype, f"moec_{name}_{v.lanes}", *args)


def masked_sum(v: Vector, sums: Expr, x: Expr, mask: Expr) -> Expr:
    """int32x16: `sums` and those of the 32 integers at address `x` that the mask lets through."""
    return call(v, f"int32x{LANES}", "masked_sum", sums, x, mask)


def dot_pairs(v: Vector, sums: Expr, x: Expr, w: Expr) -> Expr:
    """int32x16: `sums` and the dot products of pairs of 16-bit integers."""
    return call(v, f"int32x{LANES}", "dot_pairs", sums, x, w)


def expand(v: Vector, where: Expr, mask: Expr) -> None:
    """Write 32 integers of 16 bits: 1 where the mask has a bit, else 0."""
    T.evaluate(call(v, "int32", "expand", where, mask))


def total(v: Vector, sums: Expr) -> Expr:
    """The sum of the 16 lanes."""
    return T.bind(call(v, "int32", "lanes_total", T.bind(sums)))


def zero(buffer: Buffer) -> None:
    T.buffer_store(buffer, T.broadcast(T.int32(0), LANES), [T.ramp(0, 1, LANES)])


def functions(target: Target) -> AbstractContextManager[object]:
    """The frame that the kernel must be made in."""
    text = llvm_functions(target) + mask_functions(target)
    return T.attr(tirx.const(0, "int32"), "pragma_import_llvm", text)  # type: ignore[no-any-return]
