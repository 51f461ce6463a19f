"""Vectors of int32 lanes, and the bytes in them: rows to codes, codes to bytes.

A lane holds four neighbours along K, the first in the lowest byte; of codes of four bits it
holds eight, the first four in the low halves of the bytes. Codes of weights are unsigned and
those of activations signed; dot_products.py multiplies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.llvm.frame import llvm_frame
from moec.codegen.cpu.llvm.vector_text import llvm_functions
from moec.codegen.cpu.quantised import dot_products
from moec.codegen.cpu.quantised.dot_products import splat
from moec.codegen.cpu.vector import Vector
from moec.formats.integer import E2M1_TWICE, E2M1_ZERO
from moec.target.cpu import Target

_ROUNDER, _ROUNDER_BITS = "0x4168000000000000", "1262485504"  # 1.5 * 2^23, and its bits


def functions(v: Vector) -> AbstractContextManager[object]:
    """The frame that everything here, and all of `Vector`, must be called in."""
    text = llvm_functions(v.target) + _functions(v.target)
    return llvm_frame(text)


def rounded(v: Vector, x: Expr, inverse: Expr) -> Expr:
    """x * inverse, rounded to the nearest integer, as int32 lanes; for NaN some integers."""
    return T.bind(_call(v, f"int32x{v.lanes}", "rounded", x, v.splat(inverse)))


def store_narrow(v: Vector, buffer: Buffer, index: list[Expr], x: Expr, bits: int) -> None:
    """The low `bits` (8 or 16) of int32 lanes into the int32 `buffer` from `index` on."""
    where = T.address_of(buffer[tuple(index)])
    T.evaluate(_call(v, "int32", f"store_narrow{bits}", where, x))


def signed_bytes(v: Vector, x: Expr) -> list[Expr]:
    """Lanes of -32640 .. 32639 -> a and b of -128 .. 127 for which x = 256 a + b."""
    half = T.broadcast(T.int32(128), v.lanes)
    upper = T.bind(T.shift_right(x + half, T.broadcast(T.int32(8), v.lanes)))
    return [upper, T.bind(x - upper * T.broadcast(T.int32(256), v.lanes))]


def joined(v: Vector, sums: Sequence[Expr]) -> Expr:
    """Sums of integers as float32 lanes: of bytes, or of upper and of lower bytes."""
    first, *lower = [T.bind(T.cast(T.bind(sum), v.dtype)) for sum in sums]
    return T.bind(v.fma(first, v.splat(256.0), lower[0])) if lower else first


def total(v: Vector, x: Expr) -> Expr:
    """The sum of int32 lanes."""
    return T.bind(_call(v, "int32", "total", x))


def lessened(v: Vector, codes: Expr) -> Expr:
    """Unsigned bytes, less 128, as signed ones."""
    return T.bind(T.bitwise_xor(codes, T.broadcast(T.int32(0x80808080 - 2**32), v.lanes)))


def low4(v: Vector, words: Expr) -> Expr:
    """The first four codes of each lane, as bytes."""
    return T.bind(T.bitwise_and(words, T.broadcast(T.int32(0x0F0F0F0F), v.lanes)))


def high4(v: Vector, words: Expr) -> Expr:
    """The last four codes of each lane, as bytes."""
    return low4(v, T.shift_right(words, T.broadcast(T.int32(4), v.lanes)))


def in_all_bytes(v: Vector, bytes: Expr) -> Expr:
    """Lanes below 256 -> the same in each of their four bytes."""
    return T.bind(bytes * T.broadcast(T.int32(0x01010101), v.lanes))


def minus4(v: Vector, a: Expr, b: Expr) -> Expr:
    """The differences of bytes."""
    return T.bind(_call(v, f"int32x{v.lanes}", "minus4", a, b))


def e2m1(v: Vector, codes: Expr) -> Expr:
    """Bytes with codes of e2m1 -> twice their values, plus `E2M1_ZERO`."""
    return T.bind(_call(v, f"int32x{v.lanes}", "e2m1", codes))


def _call(v: Vector, dtype: str, name: str, *args: Expr) -> Expr:
    return T.call_extern(dtype, f"moec_{name}_{v.lanes}", *args)


@cache
def _functions(target: Target) -> str:
    n = target.vector_lanes
    return (
        _rounded(n)
        + _store_narrow(n, 8)
        + _store_narrow(n, 16)
        + _total(n)
        + _minus4(n)
        + dot_products.functions(target)
        + _e2m1(target)
    )


def _rounded(n: int) -> str:
    f, i = f"<{n} x float>", f"<{n} x i32>"
    return f"""
define linkonce_odr {i} @moec_rounded_{n}({f} %x, {f} %inverse) alwaysinline {{
  %m = fmul {f} %x, %inverse
  %t = fadd {f} %m, {splat(n, "float", _ROUNDER)}
  %b = bitcast {f} %t to {i}
  %q = sub {i} %b, {splat(n, "i32", _ROUNDER_BITS)}
  ret {i} %q
}}
"""


def _store_narrow(n: int, bits: int) -> str:
    i, e = f"<{n} x i32>", f"<{n} x i{bits}>"
    return f"""
define linkonce_odr i32 @moec_store_narrow{bits}_{n}(ptr %p, {i} %x) alwaysinline {{
  %e = trunc {i} %x to {e}
  store {e} %e, ptr %p, align 4
  ret i32 0
}}
"""


def _total(n: int) -> str:
    i = f"<{n} x i32>"
    return f"""
declare i32 @llvm.vector.reduce.add.v{n}i32({i})
define linkonce_odr i32 @moec_total_{n}({i} %a) alwaysinline {{
  %r = call i32 @llvm.vector.reduce.add.v{n}i32({i} %a)
  ret i32 %r
}}
"""


def _minus4(n: int) -> str:
    i, b = f"<{n} x i32>", f"<{4 * n} x i8>"
    return f"""
define linkonce_odr {i} @moec_minus4_{n}({i} %a, {i} %b) alwaysinline {{
  %x = bitcast {i} %a to {b}
  %y = bitcast {i} %b to {b}
  %d = sub {b} %x, %y
  %r = bitcast {b} %d to {i}
  ret {i} %r
}}
"""


def _e2m1(target: Target) -> str:
    n = target.vector_lanes
    i, c = f"<{n} x i32>", f"<{4 * n} x i8>"
    head = f"""define linkonce_odr {i} @moec_e2m1_{n}({i} %codes) alwaysinline {{
  %c = bitcast {i} %codes to {c}"""
    tail = f"""
  %r = bitcast {c} %v to {i}
  ret {i} %r
}}
"""
    shuffle = {
        8: ("avx2", "@llvm.x86.avx2.pshuf.b"),
        16: ("avx512bw", "@llvm.x86.avx512.pshuf.b.512"),
    }.get(n)
    if shuffle is not None and shuffle[0] in target.features:
        values = [E2M1_ZERO + s * value for s in (1, -1) for value in E2M1_TWICE]
        table = "<" + ", ".join(f"i8 {value}" for value in values * (n // 4)) + ">"
        return f"""
declare {c} {shuffle[1]}({c}, {c})
{head}
  %v = call {c} {shuffle[1]}({c} {table}, {c} %c){tail}"""
    b = f"<{4 * n} x i1>"

    def const(value: int) -> str:
        return splat(4 * n, "i8", str(value))

    # Magnitudes 0 1 2 3 4 6 8 12: m below 4, then 2m - 4, then 4m - 16.
    return f"""
{head}
  %m = and {c} %c, {const(7)}
  %m2 = add {c} %m, %m
  %m4 = add {c} %m2, %m2
  %two = sub {c} %m2, {const(4)}
  %four = sub {c} %m4, {const(16)}
  %small = icmp ult {c} %m, {const(4)}
  %middle = icmp ult {c} %m, {const(6)}
  %upper = select {b} %middle, {c} %two, {c} %four
  %size = select {b} %small, {c} %m, {c} %upper
  %negative = icmp ugt {c} %c, {const(7)}
  %minus = sub {c} zeroinitializer, %size
  %signed = select {b} %negative, {c} %minus, {c} %size
  %v = add {c} %signed, {const(E2M1_ZERO)}{tail}"""
