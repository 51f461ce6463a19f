"""Compressed weights as pairs of masks.

The entry of a codeword is two masks of up to 28 weights and their length (formats/ternary_code.py);
a word of two planes is two masks of 32 weights (formats/two_bit.py). The 32 corresponding elements
of x are one vector of 16-bit integers: a mask selects some of them, and one instruction adds the
selected ones to a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.compressed.lanes import call
from moec.codegen.cpu.compressed.ternary_walk import Take, Ternary
from moec.codegen.cpu.frame import argument
from moec.codegen.cpu.llvm.masks import LANES
from moec.codegen.cpu.vector import Vector
from moec.codegen.specs.products import LinearSpec
from moec.formats.two_bit import NEIGHBOURS, words

TURNS = 2
"""Independent sums of a walk: an addition to a sum waits for the previous addition to it."""


class Masked:
    """Operations with masks."""

    turns = TURNS

    def add(self, v: Vector, sums: Expr, x: Expr, factor: Expr) -> Expr:
        """int32x16: `sums` plus those of the 32 integers at address `x` that the mask selects."""
        return call(v, f"int32x{LANES}", "masked_sum", sums, x, factor)

    def expand(self, v: Vector, where: Expr, factor: Expr) -> None:
        """Write 32 16-bit integers: 1 where the mask's bit is set, else 0."""
        T.evaluate(call(v, "int32", "expand_mask", where, factor))


@dataclass(frozen=True)
class Masks(Masked, Ternary):
    """Ternary weights as two masks: where they are the row's least, and where its greatest. `table`
    is int64[65536]."""

    def entry(self, code: Expr) -> tuple[Expr, Expr, Expr]:
        entry = T.bind(self.table[code])
        upper = T.bind(T.cast(T.shift_right(entry, T.int64(32)), "int32"))
        b = T.bind(T.bitwise_and(upper, T.int32(0x0FFFFFFF)))
        reach = T.bitwise_and(T.shift_right(entry, T.int64(60)), T.int64(15))
        return T.bind(T.cast(entry, "int32")), b, reach

    @staticmethod
    def value(least: Expr, greatest: Expr, a: Expr, b: Expr, total: Expr) -> Expr:
        return least * T.cast(a, "float32") + greatest * T.cast(b, "float32")


@dataclass(frozen=True)
class TwoBits(Masked):
    """planes int64[E, n, words], grid bfloat16[E, n, 2]."""

    planes: Buffer
    grid: Buffer

    @staticmethod
    def of(spec: LinearSpec, i: int) -> TwoBits:
        return TwoBits(
            argument(f"planes{i}", (spec.groups, spec.n, words(spec.k)), "int64"),
            argument(f"grid{i}", (spec.groups, spec.n, 2), "bfloat16"),
        )

    def cursor(self, n: int, group: Expr, column: Expr) -> None:
        """None: the start of a row follows from its index."""

    def each(self, n: int, group: Expr, column: Expr, cursor: None, take: Take) -> None:
        count = int(self.planes.shape[2])

        def one(word: Expr, turn: int) -> None:
            both = T.bind(self.planes[group, column, word])
            b = T.bind(T.cast(T.shift_right(both, T.int64(32)), "int32"))
            take(turn, word * (NEIGHBOURS // 2), T.bind(T.cast(both, "int32")), b)

        with T.serial(0, count // TURNS) as step:
            for turn in range(TURNS):
                one(step * TURNS + turn, turn)
        for word in range(count // TURNS * TURNS, count):
            one(T.int32(word), 0)

    @staticmethod
    def value(step: Expr, zero: Expr, a: Expr, b: Expr, total: Expr) -> Expr:
        codes = T.cast(a, "float32") + T.float32(2) * T.cast(b, "float32")
        return step * (codes - zero * T.cast(total, "float32"))
