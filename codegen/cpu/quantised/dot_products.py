"""Dot products of bytes: unsigned codes of weights with signed ones of activations, in int32 lanes.

A lane holds four bytes of each. Both ways give the same integers:

    DOT4     one instruction (x86, Arm's i8mm), or four products in lanes of 16 bits where a target
             has none. Arm's dotprod multiplies signed bytes alone: codes of eight bits must be
             lessened by 128 first.
    SMALL    where x86 has none, one instruction makes sums of two products in 16 bits; codes are
             so small that these hold the sums of all bytes of a word of codes

For codes of eight bits that instruction is no gain: their sizes with x that has their signs would
be in range, but two multiplications remain, and signs take the same two of a Zen 3's four ports.
Bytes of x that lie apart, as 16 bits, were no faster either.
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


def way(target: CpuTarget, greatest: int, per_word: int) -> Way:
    """The fastest for codes up to `greatest`, some to a word."""
    in_range = greatest * 128 * (per_word // 2) < 2**15
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
