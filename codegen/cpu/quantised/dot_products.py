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

from moec.codegen.cpu.llvm.pair_sums import pair_sums
from moec.codegen.cpu.vector import Vector
from moec.target.cpu import Target


class Way(Enum):
    DOT4 = "dot4"
    SMALL = "small"


def way(target: Target, greatest: int, per_word: int) -> Way:
    """The fastest for codes up to `greatest`, some to a word."""
    in_range = greatest * 128 * (per_word // 2) < 2**15
    return Way.SMALL if in_range and target.byte_pairs and not target.int8_dot else Way.DOT4


def dots(v: Vector, way: Way, acc: Expr, codes: Sequence[Expr], x: Sequence[Expr]) -> Expr:
    """acc + the dot products of each of `codes`, the bytes of a word, with one of `x`."""

    def call(name: str, *arguments: Expr) -> Expr:
        return T.bind(T.call_extern(f"int32x{v.lanes}", f"moec_{name}_{v.lanes}", *arguments))

    if way is Way.DOT4:
        for some, own in zip(codes, x, strict=True):
            acc = call("dot4", acc, some, own)
        return acc
    total, *others = [call("pairs", some, own) for some, own in zip(codes, x, strict=True)]
    for pairs in others:
        total = call("plus16", total, pairs)
    return call("join", acc, total)


def functions(target: Target) -> str:
    """What `dots` calls, as LLVM text."""
    return _dot4(target) + (_small(target) if target.byte_pairs else "")


def splat(n: int, kind: str, value: str) -> str:
    """A constant of LLVM: `value` in all n lanes."""
    return "<" + ", ".join([f"{kind} {value}"] * n) + ">"


def _dot4(target: Target) -> str:
    n = target.vector_lanes
    i = f"<{n} x i32>"
    head = f"define linkonce_odr {i} @moec_dot4_{n}({i} %acc, {i} %a, {i} %b) alwaysinline {{"
    if target.int8_dot:
        bytes_ = f"<{4 * n} x i8>"
        arm = "sdot" if target.int8_signed else "usdot"
        dot = {
            16: "@llvm.x86.avx512.vpdpbusd.512",
            8: "@llvm.x86.avx512.vpdpbusd.256",
            4: f"@llvm.aarch64.neon.{arm}.v4i32.v16i8",
        }[n]
        return f"""
declare {i} {dot}({i}, {bytes_}, {bytes_})
{head}
  %x = bitcast {i} %a to {bytes_}
  %y = bitcast {i} %b to {bytes_}
  %r = call {i} {dot}({i} %acc, {bytes_} %x, {bytes_} %y)
  ret {i} %r
}}
"""
    h = f"<{2 * n} x i16>"
    eight, mask = splat(2 * n, "i16", "8"), splat(2 * n, "i16", "255")
    return f"""
{head}
  %x = bitcast {i} %a to {h}
  %y = bitcast {i} %b to {h}
  %xl = and {h} %x, {mask}
  %xh = lshr {h} %x, {eight}
  %ys = shl {h} %y, {eight}
  %yl = ashr {h} %ys, {eight}
  %yh = ashr {h} %y, {eight}{pair_sums(n, "l", "%xl", "%yl")}{pair_sums(n, "h", "%xh", "%yh")}
  %s = add {i} %l, %h
  %r = add {i} %acc, %s
  ret {i} %r
}}
"""


def _small(target: Target) -> str:
    n = target.vector_lanes
    i, h, b = f"<{n} x i32>", f"<{2 * n} x i16>", f"<{4 * n} x i8>"
    of_bytes = {8: "avx2.pmadd.ub.sw", 16: "avx512.pmaddubs.w.512"}[n]
    of_pairs = {8: "avx2.pmadd.wd", 16: "avx512.pmaddw.d.512"}[n]
    return f"""
declare {h} @llvm.x86.{of_bytes}({b}, {b})
declare {i} @llvm.x86.{of_pairs}({h}, {h})
define linkonce_odr {i} @moec_pairs_{n}({i} %codes, {i} %x) alwaysinline {{
  %c = bitcast {i} %codes to {b}
  %y = bitcast {i} %x to {b}
  %s = call {h} @llvm.x86.{of_bytes}({b} %c, {b} %y)
  %r = bitcast {h} %s to {i}
  ret {i} %r
}}
define linkonce_odr {i} @moec_plus16_{n}({i} %a, {i} %b) alwaysinline {{
  %x = bitcast {i} %a to {h}
  %y = bitcast {i} %b to {h}
  %s = add {h} %x, %y
  %r = bitcast {h} %s to {i}
  ret {i} %r
}}
define linkonce_odr {i} @moec_join_{n}({i} %acc, {i} %pairs) alwaysinline {{
  %p = bitcast {i} %pairs to {h}
  %s = call {i} @llvm.x86.{of_pairs}({h} %p, {h} {splat(2 * n, "i16", "1")})
  %r = add {i} %acc, %s
  ret {i} %r
}}
"""
