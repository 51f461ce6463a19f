"""LLVM functions on int32 lanes and the bytes in them: codes of rows and of weights.

A code of e4m3 in the place of a 16-bit float keeps its sign and fraction, and its exponent has
another bias. In float16 it is a number, 2^-8 of its value. In bf16 the bias is added; to the eight
magnitudes without an exponent, which no instruction would normalise, something else is added, from
a table in a register. The two NaN of e4m3 become finite: packing marks them in the scales.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from moec.codegen.cpu.llvm.constants import pair_sums, splat
from moec.ir.formats.integer import E2M1_TWICE, E2M1_ZERO
from moec.target.cpu import CpuTarget

_FRACTIONS = np.arange(8)
_SMALL = (((_FRACTIONS / 512).astype("f4").view("u4") >> 16) - (_FRACTIONS << 4)).tolist()
_ROUNDER, _ROUNDER_BITS = "0x4168000000000000", "1262485504"  # 1.5 * 2^23, and its bits


@cache
def integer_functions(target: CpuTarget) -> str:
    n = target.vector_lanes
    return (
        _rounded(n)
        + _store_narrow(n, 8)
        + _store_narrow(n, 16)
        + _total(n)
        + _minus4(n)
        + dot_product_functions(target)
        + _e2m1(target)
        + "".join(_e4m3_floats(n, element) for element in range(4))
        + ("".join(map(_e4m3_pairs, range(2))) if target.bf16_dot else "")
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


def _e2m1(target: CpuTarget) -> str:
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
        return splat(4 * n, "i8", value)

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


def _e4m3_floats(n: int, element: int) -> str:
    """Lanes of words -> float32 lanes: the lower or upper half of the 16-bit lanes' low or high
    bytes."""
    odd, half = divmod(element, 2)
    h, lanes = f"<{2 * n} x i16>", ", ".join(f"i32 {half * n + i}" for i in range(n))
    return f"""
define linkonce_odr <{n} x float> @moec_e4m3_{element}_{n}(<{n} x i32> %words) alwaysinline {{
  %w = bitcast <{n} x i32> %words to {h}
  %c = shl {h} %w, {splat(2 * n, "i16", "0" if odd else "8")}
  %s = ashr {h} %c, {splat(2 * n, "i16", "1")}
  %m = and {h} %s, {splat(2 * n, "i16", str(0xBF80 - 2**16))}
  %e = shufflevector {h} %m, {h} poison, <{n} x i32> <{lanes}>
  %p = alloca <{n} x i16>
  store <{n} x i16> %e, ptr %p, align 2
  %f = call <{n} x float> @moec_load_float16_{n}(ptr %p)
  ret <{n} x float> %f
}}
"""


def _e4m3_pairs(odd: int) -> str:
    """Lanes of words -> lanes of bf16 pairs: of the 16-bit lanes' low or high bytes."""
    i, h = "<16 x i32>", "<32 x i16>"
    up, down, bits, exponent, four, bias = (
        splat(32, "i16", value)
        for value in (8 * (1 - odd), 8 * odd, 0x87F0 - 2**16, 0x78 << 8 * odd, 4, 120 << 7)
    )
    table = ", ".join(f"i16 {value}" for value in _SMALL * 4)
    permute = "@llvm.x86.avx512.permvar.hi.512"
    return f"""
declare {h} {permute}({h}, {h})
define linkonce_odr {i} @moec_e4m3_pairs_{odd}_16({i} %words) alwaysinline {{
  %w = bitcast {i} %words to {h}
  %c = shl {h} %w, {up}
  %s = ashr {h} %c, {four}
  %m = and {h} %s, {bits}
  %x = and {h} %w, {exponent}
  %small = icmp eq {h} %x, zeroinitializer
  %i = lshr {h} %w, {down}
  %more = call {h} {permute}({h} <{table}>, {h} %i)
  %add = select <32 x i1> %small, {h} %more, {h} {bias}
  %b = add {h} %m, %add
  %r = bitcast {h} %b to {i}
  ret {i} %r
}}
"""


def dot_product_functions(target: CpuTarget) -> str:
    return dot4(target) + (_small(target) if target.byte_pairs else "")


def dot4(target: CpuTarget) -> str:
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


def _small(target: CpuTarget) -> str:
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
