"""Attention of 16 rows to one block of keys, on AMX tile registers.

Packed keys and values (prefill.py) are pairs of bf16 in int32 lanes: 16 units of 16 keys, or of 16
features, are loaded to a register without rearrangement. Scores and weights are stored in memory
between the two products, row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.tirx import Buffer

from moec.codegen.cpu.llvm.amx import SUMS, TILE_ROWS
from moec.codegen.cpu.vector import Vector

UNITS = TILE_ROWS  # int32 units of a row that one register holds
_ROWS, _TURNS = SUMS, 3  # the register of rows; the next three alternate for keys and values


@dataclass(frozen=True)
class Scratch:
    """Memory between the products: scores[row, key], weights[row, pair of keys]."""

    scores: Buffer
    weights: Buffer

    @staticmethod
    def of(v: Vector, block: int) -> Scratch:
        return Scratch(
            v.scratch((TILE_ROWS, block), "float32"), v.scratch((TILE_ROWS, block // 2), "int32")
        )


def multiply(
    v: Vector,
    rows: Callable[[int], Expr],
    row_units: int,
    units: int,
    other: Callable[[int, int], Expr],
    other_units: int,
    out: Callable[[int], Expr],
    vectors: int,
    added: bool,
) -> None:
    """out[16 rows, 16 of vector j] (+)= rows[16, units] @ other[units, 16 of vector j].

    `rows(u)`, `other(u, j)` and `out(j)` are the first elements of the blocks, at row 0 or unit u.
    Rows of the first are `row_units` int32 apart, of the second `other_units` int32, of `out`
    `other_units` float32. `added`: (+)= adds; else it overwrites.
    """
    for first in range(0, vectors, SUMS):
        group = range(first, min(first + SUMS, vectors))
        for i, j in enumerate(group):
            if added:
                v.tile_load(i, out(j), other_units * 4)
            else:
                v.tile_zero(i)
        for u in range(0, units, UNITS):
            v.tile_load(_ROWS, rows(u), row_units * 4)
            for i, j in enumerate(group):
                register = _ROWS + 1 + i % _TURNS
                v.tile_load(register, other(u, j), other_units * 4)
                v.tile_bf16(i, _ROWS, register)
        for i, j in enumerate(group):
            v.tile_store(i, out(j), other_units * 4)
