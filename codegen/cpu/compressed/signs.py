"""Ternary weights as bytes -1, 0 and 1, for targets without an instruction that expands masks.

An entry is 28 bytes and their number (formats/ternary_code.py). They become 16-bit integers, which
one instruction multiplies with elements of x and adds in pairs. The first factor is the signs, the
second their magnitudes: for the sums S and U of x under them,

    U + S = 2 B, U - S = 2 A,  B the sum of x where weights are their row's greatest, A the least

Entries are four times as large as masks; all codewords take 2 MiB.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.cpu.compressed.lanes import call
from moec.codegen.cpu.compressed.ternary_walk import Ternary
from moec.codegen.cpu.llvm.masks import LANES
from moec.codegen.cpu.vector import Vector
from moec.target.cpu import CpuTarget


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
    def value(least: Expr, greatest: Expr, s: Expr, u: Expr, total: Expr) -> Expr:
        # Computed as a mean, since the sum may overflow 32 bits.
        half = T.shift_right(T.bitwise_xor(u, s), T.int32(1))
        b = T.bind(T.bitwise_and(u, s) + half)
        return least * T.cast(u - b, "float32") + greatest * T.cast(b, "float32")
