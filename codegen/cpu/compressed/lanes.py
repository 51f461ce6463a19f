"""Sums of integers in 16 lanes of 32 bits, on every target (llvm/masks.py)."""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.llvm.masks import LANES
from moec.codegen.cpu.vector import Vector


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
