"""Dot products of bytes: unsigned codes of weights by signed codes of activations, in int32 lanes.

A lane holds four bytes of each operand. Both ways give the same integers:

    DOT4     one instruction (x86 VNNI, Arm i8mm), or four products in 16-bit lanes on a target
             without one. Arm's dotprod multiplies signed bytes only: 128 is subtracted from 8-bit
             codes first.
    SMALL    on x86 without VNNI, one instruction adds two products in 16 bits; the codes are so
             small that 16 bits hold the sums of all bytes of a word of codes

For 8-bit codes the latter instruction does not pay: with magnitudes of codes, and x with the sign
of the codes, it would not overflow; but two multiplications remain, and the signs take the same two
of Zen 3's four ports. Spreading the bytes of x to 16 bits was not faster either.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.cpu.vector import Vector
from moec.target.cpu import CpuTarget


class Way(Enum):
    DOT4 = "dot4"
    SMALL = "small"


def way(target: CpuTarget, greatest: int, codes: int) -> Way:
    """The fastest way for codes up to `greatest`, so many in a unit of words."""
    in_range = greatest * 128 * (codes // 2) < 2**15
    return Way.SMALL if in_range and target.byte_pairs and not target.int8_dot else Way.DOT4


def dots(v: Vector, way: Way, acc: Expr, codes: Sequence[Expr], x: Sequence[Expr]) -> Expr:
    """acc + the dot products of each of `codes`, the bytes of a word, with one of `x`."""

    def call(name: str, *arguments: Expr) -> Expr:
        return T.bind(T.call_extern(f"int32x{v.lanes}", f"moec_{name}_{v.lanes}", *arguments))

    if way is Way.DOT4:
        for code, row_word in zip(codes, x, strict=True):
            acc = call("dot4", acc, code, row_word)
        return acc
    total, *others = [
        call("pairs", code, row_word) for code, row_word in zip(codes, x, strict=True)
    ]
    for pairs in others:
        total = call("plus16", total, pairs)
    return call("join", acc, total)
