"""LLVM functions of kernels with compressed weights: expansion of bits to lanes, masked sums.

They are generic LLVM code where LLVM selects good instructions, and intrinsics where it does not.
"""

from __future__ import annotations

from functools import cache

from moec.codegen.cpu.llvm.constants import pair_sums
from moec.ir.formats.ternary import START, TOGETHER
from moec.target.cpu import CpuTarget

LANES = 16
"""The number of 32-bit sums of a row, on every target: each adds two of 32 elements of x."""


@cache
def mask_functions(target: CpuTarget) -> str:
    """LLVM functions, by name moec_*_<lanes>."""
    n, two = target.vector_lanes, 2 * LANES
    i, h = f"<{LANES} x i32>", f"<{two} x i16>"
    declare = ""
    if target.byte_pairs:
        # For factors that are ones, LLVM would simplify anything but the intrinsic, and add words
        # one by one.
        declare, add = _pair_sums(target)
    else:
        add = f"""{pair_sums(LANES, "both", "%s", "%t")}
  %r = add {i} %acc, %both"""
    return f"""
{declare}
define linkonce_odr {i} @moec_dot_pairs_{n}({i} %acc, {i} %a, {i} %b) alwaysinline {{
  %s = bitcast {i} %a to {h}
  %t = bitcast {i} %b to {h}
{add}
  ret {i} %r
}}
{_masked_sum(target)}
define linkonce_odr i32 @moec_expand_mask_{n}(ptr %p, i32 %mask) alwaysinline {{
  %m = bitcast i32 %mask to <{two} x i1>
  %w = zext <{two} x i1> %m to {h}
  store {h} %w, ptr %p, align 4
  ret i32 0
}}
{_signs(n)}
declare i32 @llvm.vector.reduce.add.v{LANES}i32({i})
define linkonce_odr i32 @moec_lanes_total_{n}({i} %a) alwaysinline {{
  %r = call i32 @llvm.vector.reduce.add.v{LANES}i32({i} %a)
  ret i32 %r
}}
declare i32 @llvm.vector.reduce.add.v{TOGETHER}i32(<{TOGETHER} x i32>)
{_row_starts(1)}{_row_starts(2)}"""


def _signs(n: int) -> str:
    """Bytes of an entry of signs as 16-bit integers, computed in two halves; the last four bytes,
    which are no weights, become 0. The length is loaded separately: LLVM would extract it from the
    vector, which takes longer."""
    i, h, b = f"<{LANES} x i32>", f"<{2 * LANES} x i16>", f"<{LANES} x i8>"
    half = f"<{LANES} x i16>"
    weights = "<" + ", ".join(["i8 -1"] * 12 + ["i8 0"] * 4) + ">"
    both = "<" + ", ".join(f"i32 {j}" for j in range(2 * LANES)) + ">"
    return f"""
define linkonce_odr {i} @moec_signs_{n}(ptr %p) alwaysinline {{
  %q = getelementptr i8, ptr %p, i64 {LANES}
  %l = load {b}, ptr %p, align {LANES}
  %u = load {b}, ptr %q, align {LANES}
  %v = and {b} %u, {weights}
  %lw = sext {b} %l to {half}
  %vw = sext {b} %v to {half}
  %w = shufflevector {half} %lw, {half} %vw, <{2 * LANES} x i32> {both}
  %r = bitcast {h} %w to {i}
  ret {i} %r
}}
declare {h} @llvm.abs.v{2 * LANES}i16({h}, i1)
define linkonce_odr {i} @moec_magnitudes_{n}({i} %a) alwaysinline {{
  %w = bitcast {i} %a to {h}
  %m = call {h} @llvm.abs.v{2 * LANES}i16({h} %w, i1 true)
  %r = bitcast {h} %m to {i}
  ret {i} %r
}}
define linkonce_odr {i} @moec_signed_sum_{n}({i} %acc, ptr %p, {i} %w) alwaysinline {{
  %x = load {i}, ptr %p, align 4
  %r = call {i} @moec_dot_pairs_{n}({i} %acc, {i} %x, {i} %w)
  ret {i} %r
}}
define linkonce_odr i64 @moec_reach_{n}(ptr %p) alwaysinline {{
  %q = getelementptr i8, ptr %p, i64 {2 * LANES - 1}
  %b = load volatile i8, ptr %q
  %r = zext i8 %b to i64
  ret i64 %r
}}
define linkonce_odr i32 @moec_expand_signs_{n}(ptr %p, {i} %w) alwaysinline {{
  store {i} %w, ptr %p, align 4
  ret i32 0
}}"""


def _masked_sum(target: CpuTarget) -> str:
    n, two = target.vector_lanes, 2 * LANES
    i, h = f"<{LANES} x i32>", f"<{two} x i16>"
    if not (target.byte_pairs and n == 8):
        let_through = f"""
  %m = bitcast i32 %mask to <{two} x i1>
  %z = select <{two} x i1> %m, {h} %x, {h} zeroinitializer"""
    else:
        # No instruction expands bits to lanes. Copying all 32 bits to each lane leaves bits 0 to
        # 15 in the even words and 16 to 31 in the odd ones, so x is permuted to the same order.
        order = [j // 2 + LANES * (j % 2) for j in range(two)]
        order = [*order[:8], *order[16:24], *order[8:16], *order[24:]]  # two unpackings
        indices = ", ".join(f"i32 {index}" for index in order)
        bits = ", ".join(f"i16 {(1 << index % 16) - (index % 16 == 15) * 65536}" for index in order)
        let_through = f"""
  %o = shufflevector {h} %x, {h} poison, <{two} x i32> <{indices}>
  %e = insertelement {i} poison, i32 %mask, i32 0
  %s = shufflevector {i} %e, {i} poison, {i} zeroinitializer
  %w = bitcast {i} %s to {h}
  %b = and {h} %w, <{bits}>
  %m = icmp eq {h} %b, <{bits}>
  %z = select <{two} x i1> %m, {h} %o, {h} zeroinitializer"""
    ones = "<" + ", ".join(["i16 1"] * two) + ">"
    return f"""
define linkonce_odr {i} @moec_masked_sum_{n}({i} %acc, ptr %p, i32 %mask) alwaysinline {{
  %x = load {h}, ptr %p, align 4{let_through}
  %v = bitcast {h} %z to {i}
  %u = bitcast {h} {ones} to {i}
  %r = call {i} @moec_dot_pairs_{n}({i} %acc, {i} %v, {i} %u)
  ret {i} %r
}}"""


def _pair_sums(target: CpuTarget) -> tuple[str, str]:
    """Declarations, and code for %r = %acc + the sums of pairs of products of %s and %t, on x86."""
    i, h = f"<{LANES} x i32>", f"<{2 * LANES} x i16>"
    if target.vector_lanes == LANES and target.int8_dot:  # avx512vnni holds both
        dot = "@llvm.x86.avx512.vpdpwssd.512"
        return (
            f"declare {i} {dot}({i}, {h}, {h})",
            f"  %r = call {i} {dot}({i} %acc, {h} %s, {h} %t)",
        )
    if target.vector_lanes == LANES:
        dot = "@llvm.x86.avx512.pmaddw.d.512"
        return (
            f"declare {i} {dot}({h}, {h})",
            f"""
  %p = call {i} {dot}({h} %s, {h} %t)
  %r = add {i} %acc, %p""",
        )
    dot, half, sums = "@llvm.x86.avx2.pmadd.wd", f"<{LANES} x i16>", f"<{LANES // 2} x i32>"
    parts = [
        "<" + ", ".join(f"i32 {first + j}" for j in range(LANES)) + ">" for first in (0, LANES)
    ]
    return (
        f"declare {sums} {dot}({half}, {half})",
        f"""
  %s0 = shufflevector {h} %s, {h} poison, <{LANES} x i32> {parts[0]}
  %s1 = shufflevector {h} %s, {h} poison, <{LANES} x i32> {parts[1]}
  %t0 = shufflevector {h} %t, {h} poison, <{LANES} x i32> {parts[0]}
  %t1 = shufflevector {h} %t, {h} poison, <{LANES} x i32> {parts[1]}
  %p0 = call {sums} {dot}({half} %s0, {half} %t0)
  %p1 = call {sums} {dot}({half} %s1, {half} %t1)
  %p = shufflevector {sums} %p0, {sums} %p1, <{LANES} x i32> {parts[0]}
  %r = add {i} %acc, %p""",
    )


def _row_starts(size: int) -> str:
    """Functions for the number of codewords before a row within its group, and in the row."""
    kind = f"i{8 * size}"
    c, i, m = f"<{TOGETHER} x {kind}>", f"<{TOGETHER} x i32>", f"<{TOGETHER} x i1>"
    indices = "<" + ", ".join(f"{kind} {j}" for j in range(TOGETHER)) + ">"
    return f"""
define linkonce_odr i32 @moec_row_start_{size}(ptr %p, i32 %inside) alwaysinline {{
  %first = load i32, ptr %p, align 4
  %q = getelementptr i8, ptr %p, i64 {START}
  %c = load {c}, ptr %q, align {size}
  %n = trunc i32 %inside to {kind}
  %x = insertelement {c} poison, {kind} %n, i32 0
  %s = shufflevector {c} %x, {c} poison, {i} zeroinitializer
  %m = icmp slt {c} {indices}, %s
  %z = select {m} %m, {c} %c, {c} zeroinitializer
  %w = zext {c} %z to {i}
  %t = call i32 @llvm.vector.reduce.add.v{TOGETHER}i32({i} %w)
  %r = add i32 %first, %t
  ret i32 %r
}}
define linkonce_odr i32 @moec_row_words_{size}(ptr %p, i32 %inside) alwaysinline {{
  %q = getelementptr i8, ptr %p, i64 {START}
  %e = getelementptr {kind}, ptr %q, i32 %inside
  %c = load {kind}, ptr %e, align {size}
  %r = zext {kind} %c to i32
  ret i32 %r
}}
"""
