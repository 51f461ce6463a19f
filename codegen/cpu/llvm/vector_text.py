"""The LLVM functions that kernels call: memory in every float type, multiply-adds, exp, reductions.

TVM rewrites bf16 arithmetic and bf16 arguments to float32 or to integers before LLVM. A kernel
therefore passes the *address* of an element, and these functions access it. They are always
inlined, so that a call costs nothing. All names end in the number of lanes; modules for different
targets can be linked together only if their widths differ.
"""

from __future__ import annotations

from functools import cache

from moec.codegen.cpu.llvm.amx import tile_functions
from moec.codegen.cpu.llvm.constants import EXP, f32, splat
from moec.target.cpu import CpuTarget

# LLVM functions for unpacked matrices, in PyTorch's layout: pairs of rows.
#
# Two consecutive bf16 elements of a row are one word, the first in its low half. Names and inlining
# are as in vector_text.py.


def row_functions(n: int) -> str:
    """Words of two rows -> the pairs of even columns, one element of each row."""
    i, h = f"<{n} x i32>", f"<{n} x i16>"
    return f"""
define linkonce_odr {i} @moec_words_{n}(ptr %p) alwaysinline {{
  %w = load {i}, ptr %p, align 2
  ret {i} %w
}}
define linkonce_odr {i} @moec_even_{n}({i} %a, {i} %b) alwaysinline {{
  %l = and {i} %a, {splat(n, "i32", 0xFFFF)}
  %h = shl {i} %b, {splat(n, "i32", 16)}
  %r = or {i} %l, %h
  ret {i} %r
}}
define linkonce_odr {i} @moec_halves_{n}(ptr %p) alwaysinline {{
  %e = load {h}, ptr %p, align 2
  %w = zext {h} %e to {i}
  ret {i} %w
}}"""


_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_ROUNDER = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits
_ROUNDER_BITS = 0x4B400000


@cache
def vector_functions(target: CpuTarget) -> str:
    """The text for `pragma_import_llvm`: every function that `vector.Vector` calls."""
    n = target.vector_lanes
    parts = [_memory_f64(n), _memory_f32(n), _memory_bf16(n, target), _memory_f16(n, target)]
    parts += [_scalars(target), _arithmetic(n, target), _exp(n), row_functions(n)]
    if target.bf16_dot:
        parts.append(_BF16_DOT)
    if target.bf16_tiles:
        parts.append(tile_functions())
    lines = "\n".join(parts).splitlines()
    declarations = dict.fromkeys(line for line in lines if line.startswith("declare"))
    return "\n".join([*declarations, *(line for line in lines if line not in declarations)])


def _memory(n: int, name: str, element: str, widen: str, narrow: str) -> str:
    """Load and store `n` elements, or the first `count` (the memory of others is not touched)."""
    f, e = f"<{n} x float>", f"<{n} x {element}>"
    lane_numbers = "<" + ", ".join(f"i32 {i}" for i in range(n)) + ">"
    mask = f"""
  %c0 = insertelement <{n} x i32> poison, i32 %count, i32 0
  %cs = shufflevector <{n} x i32> %c0, <{n} x i32> poison, <{n} x i32> zeroinitializer
  %mask = icmp slt <{n} x i32> {lane_numbers}, %cs"""
    align = {"double": 8, "float": 4}.get(element, 2)
    args = f"ptr %p, {f} %f"
    where = f"ptr %p, i32 {align}, <{n} x i1> %mask"
    short = f"v{n}{ {'double': 'f64', 'float': 'f32', 'i16': 'i16'}[element] }"
    store_some = f"  call void @llvm.masked.store.{short}.p0({e} %e, {where})"
    if element == "i16":
        # LLVM 22 writes two bytes too many where a truncation meets a constant mask of one
        # lane, so these lanes go through the stack.
        store_some = f"""
  %stack = alloca {e}, align 64
  store {e} %e, ptr %stack, align 64
  %words = zext i32 %count to i64
  %bytes = mul i64 %words, 2
  call void @llvm.memcpy.p0.p0.i64(ptr align 2 %p, ptr align 64 %stack, i64 %bytes, i1 false)"""
    return f"""
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare {e} @llvm.masked.load.{short}.p0(ptr, i32, <{n} x i1>, {e})
declare void @llvm.masked.store.{short}.p0({e}, ptr, i32, <{n} x i1>)
define linkonce_odr {f} @moec_load_{name}_{n}(ptr %p) alwaysinline {{
  %e = load {e}, ptr %p, align {align}
{widen}
  ret {f} %f
}}
define linkonce_odr {f} @moec_load_tail_{name}_{n}(ptr %p, i32 %count) alwaysinline {{{mask}
  %e = call {e} @llvm.masked.load.{short}.p0({where}, {e} zeroinitializer)
{widen}
  ret {f} %f
}}
define linkonce_odr i32 @moec_store_{name}_{n}(ptr %p, {f} %f) alwaysinline {{
{narrow}
  store {e} %e, ptr %p, align {align}
  ret i32 0
}}
define linkonce_odr i32 @moec_store_tail_{name}_{n}({args}, i32 %count) alwaysinline {{{mask}
{narrow}
{store_some}
  ret i32 0
}}"""


def _memory_f64(n: int) -> str:
    """Rounded to float32, in which vectors compute."""
    f, e = f"<{n} x float>", f"<{n} x double>"
    return _memory(
        n, "float64", "double", f"  %f = fptrunc {e} %e to {f}", f"  %e = fpext {f} %f to {e}"
    )


def _memory_f32(n: int) -> str:
    same = f"<{n} x float>"
    return _memory(
        n,
        "float32",
        "float",
        f"  %f = bitcast {same} %e to {same}",
        f"  %e = bitcast {same} %f to {same}",
    )


def _memory_bf16(n: int, target: CpuTarget) -> str:
    i = f"<{n} x i32>"
    widen = f"""
  %w = zext <{n} x i16> %e to {i}
  %s = shl {i} %w, {splat(n, "i32", "16")}
  %f = bitcast {i} %s to <{n} x float>"""
    if target.bf16_dot:  # targets with the dot product have the conversion too
        narrow = f"""
  %b = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<{n} x float> %f)
  %e = bitcast <16 x bfloat> %b to <16 x i16>"""
        declare = "declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)"
    else:  # to nearest, ties to even; a NaN stays one
        narrow = f"""
  %b = bitcast <{n} x float> %f to {i}
  %h = lshr {i} %b, {splat(n, "i32", "16")}
  %o = and {i} %h, {splat(n, "i32", "1")}
  %r1 = add {i} %b, {splat(n, "i32", "32767")}
  %r2 = add {i} %r1, %o
  %r3 = lshr {i} %r2, {splat(n, "i32", "16")}
  %q = or {i} %h, {splat(n, "i32", "64")}
  %nan = fcmp uno <{n} x float> %f, zeroinitializer
  %k = select <{n} x i1> %nan, {i} %q, {i} %r3
  %e = trunc {i} %k to <{n} x i16>"""
        declare = ""
    return declare + _memory(n, "bfloat16", "i16", widen, narrow)


def _memory_f16(n: int, target: CpuTarget) -> str:
    f, i = f"<{n} x float>", f"<{n} x i32>"
    if target.f16_convert:
        widen = f"""
  %h = bitcast <{n} x i16> %e to <{n} x half>
  %f = fpext <{n} x half> %h to {f}"""
        narrow = f"""
  %h = fptrunc {f} %f to <{n} x half>
  %e = bitcast <{n} x half> %h to <{n} x i16>"""
        return _memory(n, "float16", "i16", widen, narrow)
    # Moving the bits up and scaling by 2^112 is right for subnormals too; infinity and NaN
    # need the greatest exponent put back.
    widen = f"""
  %w = zext <{n} x i16> %e to {i}
  %s0 = and {i} %w, {splat(n, "i32", str(0x8000))}
  %s = shl {i} %s0, {splat(n, "i32", "16")}
  %m0 = and {i} %w, {splat(n, "i32", str(0x7FFF))}
  %m1 = shl {i} %m0, {splat(n, "i32", "13")}
  %m2 = bitcast {i} %m1 to {f}
  %m3 = fmul {f} %m2, {splat(n, "float", f32(2.0**112))}
  %m4 = bitcast {f} %m3 to {i}
  %big = icmp uge {i} %m0, {splat(n, "i32", str(0x7C00))}
  %top = or {i} %m1, {splat(n, "i32", str(0x7F800000))}
  %m5 = select <{n} x i1> %big, {i} %top, {i} %m4
  %m6 = or {i} %m5, %s
  %f = bitcast {i} %m6 to {f}"""
    # Subnormal halves: adding 0.5 rounds the value to a multiple of 2^-24 in the low bits.
    narrow = f"""
  %b = bitcast {f} %f to {i}
  %a = and {i} %b, {splat(n, "i32", str(0x7FFFFFFF))}
  %sg0 = xor {i} %b, %a
  %sg = lshr {i} %sg0, {splat(n, "i32", "16")}
  %o0 = lshr {i} %a, {splat(n, "i32", "13")}
  %o = and {i} %o0, {splat(n, "i32", "1")}
  %n1 = add {i} %a, {splat(n, "i32", str(0xFFF - (112 << 23)))}
  %n2 = add {i} %n1, %o
  %n3 = lshr {i} %n2, {splat(n, "i32", "13")}
  %d0 = bitcast {i} %a to {f}
  %d1 = fadd {f} %d0, {splat(n, "float", f32(0.5))}
  %d2 = bitcast {f} %d1 to {i}
  %d3 = sub {i} %d2, {splat(n, "i32", str(0x3F000000))}
  %small = icmp ult {i} %a, {splat(n, "i32", str(113 << 23))}
  %k0 = select <{n} x i1> %small, {i} %d3, {i} %n3
  %over = icmp uge {i} %a, {splat(n, "i32", str(0x477FF000))}
  %k1 = select <{n} x i1> %over, {i} {splat(n, "i32", str(0x7C00))}, {i} %k0
  %nan = icmp ugt {i} %a, {splat(n, "i32", str(0x7F800000))}
  %k2 = select <{n} x i1> %nan, {i} {splat(n, "i32", str(0x7E00))}, {i} %k1
  %k3 = or {i} %k2, %sg
  %e = trunc {i} %k3 to <{n} x i16>"""
    return _memory(n, "float16", "i16", widen, narrow)


def _scalars(target: CpuTarget) -> str:
    """One element as float32, and a pair of 16-bit elements (or the last one and 0) as int32."""
    n = target.vector_lanes
    if target.f16_convert:
        half = """
  %h = load half, ptr %p, align 2
  %f = fpext half %h to float"""
    else:  # the vector code, on one lane
        half = f"""
  %v = call <{n} x float> @moec_load_tail_float16_{n}(ptr %p, i32 1)
  %f = extractelement <{n} x float> %v, i32 0"""
    return f"""
define linkonce_odr float @moec_scalar_float32_{n}(ptr %p) alwaysinline {{
  %f = load float, ptr %p, align 4
  ret float %f
}}
define linkonce_odr float @moec_scalar_bfloat16_{n}(ptr %p) alwaysinline {{
  %h = load i16, ptr %p, align 2
  %w = zext i16 %h to i32
  %s = shl i32 %w, 16
  %f = bitcast i32 %s to float
  ret float %f
}}
define linkonce_odr float @moec_scalar_float16_{n}(ptr %p) alwaysinline {{{half}
  ret float %f
}}
define linkonce_odr i32 @moec_pair_{n}(ptr %p) alwaysinline {{
  %i = load i32, ptr %p, align 2
  ret i32 %i
}}
define linkonce_odr i32 @moec_last_{n}(ptr %p) alwaysinline {{
  %h = load i16, ptr %p, align 2
  %i = zext i16 %h to i32
  ret i32 %i
}}
define linkonce_odr i32 @moec_whole_{n}(ptr %first, ptr %last) alwaysinline {{
  ret i32 0
}}
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define linkonce_odr i32 @moec_prefetch_{n}(ptr %p) alwaysinline {{
  call void @llvm.prefetch.p0(ptr %p, i32 0, i32 2, i32 1)
  ret i32 0
}}"""


def _arithmetic(n: int, target: CpuTarget) -> str:
    f = f"<{n} x float>"
    fused = (
        f"  %r = call {f} @llvm.fma.v{n}f32({f} %a, {f} %b, {f} %c)"
        if target.fma
        else f"  %m = fmul contract {f} %a, %b\n  %r = fadd contract {f} %m, %c"
    )
    unary = "".join(
        f"""
declare {f} @llvm.{name}.v{n}f32({f})
define linkonce_odr {f} @moec_{name}_{n}({f} %a) alwaysinline {{
  %r = call {f} @llvm.{name}.v{n}f32({f} %a)
  ret {f} %r
}}"""
        for name in ("sqrt", "fabs")
    )
    return f"""
declare {f} @llvm.fma.v{n}f32({f}, {f}, {f})
declare float @llvm.vector.reduce.fadd.v{n}f32(float, {f})
declare float @llvm.vector.reduce.fmax.v{n}f32({f})
define linkonce_odr {f} @moec_fma_{n}({f} %a, {f} %b, {f} %c) alwaysinline {{
{fused}
  ret {f} %r
}}
define linkonce_odr float @moec_sum_{n}({f} %a) alwaysinline {{
  %r = call reassoc float @llvm.vector.reduce.fadd.v{n}f32(float -0.0, {f} %a)
  ret float %r
}}
define linkonce_odr float @moec_max_{n}({f} %a) alwaysinline {{
  %r = call float @llvm.vector.reduce.fmax.v{n}f32({f} %a)
  ret float %r
}}
define linkonce_odr {f} @moec_low_{n}(<{n} x i32> %a) alwaysinline {{
  %s = shl <{n} x i32> %a, {splat(n, "i32", "16")}
  %r = bitcast <{n} x i32> %s to {f}
  ret {f} %r
}}
define linkonce_odr {f} @moec_high_{n}(<{n} x i32> %a) alwaysinline {{
  %s = and <{n} x i32> %a, {splat(n, "i32", "-65536")}
  %r = bitcast <{n} x i32> %s to {f}
  ret {f} %r
}}{unary}"""


def _exp(n: int) -> str:
    """exp to about 1 ulp, with exact infinities and zeros; NaN passes through."""
    f, i = f"<{n} x float>", f"<{n} x i32>"

    def const(value: float) -> str:
        return splat(n, "float", f32(value))

    def fma(a: str, b: str, c: str) -> str:
        return f"call {f} @moec_fma_{n}({f} {a}, {f} {b}, {f} {c})"

    horner = "\n".join(
        f"  %q{j} = {fma(const(EXP[0]) if j == 1 else f'%q{j - 1}', '%r', const(c))}"
        for j, c in enumerate(EXP)
        if j
    )
    # 2^k is applied in two halves: k reaches from -150 to 128, past the exponents of float32.
    return f"""
define linkonce_odr {f} @moec_exp_{n}({f} %x0) alwaysinline {{
  %hi = fcmp ogt {f} %x0, {const(89.0)}
  %x1 = select <{n} x i1> %hi, {f} {const(89.0)}, {f} %x0
  %lo = fcmp olt {f} %x1, {const(-104.0)}
  %x = select <{n} x i1> %lo, {f} {const(-104.0)}, {f} %x1
  %t = {fma("%x", const(1.4426950408889634), const(_ROUNDER))}
  %k = fsub {f} %t, {const(_ROUNDER)}
  %r0 = {fma("%k", const(-_LN2_HIGH), "%x")}
  %r = {fma("%k", const(-_LN2_LOW), "%r0")}
{horner}
  %r2 = fmul {f} %r, %r
  %p0 = {fma(f"%q{len(EXP) - 1}", "%r2", "%r")}
  %p = fadd {f} %p0, {const(1.0)}
  %tb = bitcast {f} %t to {i}
  %ki = sub {i} %tb, {splat(n, "i32", str(_ROUNDER_BITS))}
  %k1 = ashr {i} %ki, {splat(n, "i32", "1")}
  %k2 = sub {i} %ki, %k1
  %e1 = add {i} %k1, {splat(n, "i32", "127")}
  %e2 = add {i} %k2, {splat(n, "i32", "127")}
  %s1 = shl {i} %e1, {splat(n, "i32", "23")}
  %s2 = shl {i} %e2, {splat(n, "i32", "23")}
  %f1 = bitcast {i} %s1 to {f}
  %f2 = bitcast {i} %s2 to {f}
  %y1 = fmul {f} %p, %f1
  %y = fmul {f} %y1, %f2
  ret {f} %y
}}"""


def round_functions(n: int) -> str:
    """Functions that round float32 vectors to a narrower float and back."""
    return "".join(_round(n, dtype) for dtype in ("bfloat16", "float16"))


def _round(n: int, dtype: str) -> str:
    """Rounds to `dtype` and back, by a store and a load that LLVM keeps in registers. (In TVM, a
    scratch buffer of 16-bit floats would be renamed without the addresses taken of it.)"""
    f = f"<{n} x float>"
    return f"""
define linkonce_odr {f} @moec_round_{dtype}_{n}({f} %x) alwaysinline {{
  %p = alloca <{n} x i16>
  %s = call i32 @moec_store_{dtype}_{n}(ptr %p, {f} %x)
  %r = call {f} @moec_load_{dtype}_{n}(ptr %p)
  ret {f} %r
}}
"""


_F, _P = "<16 x float>", "<16 x i32>"
_B = "<32 x bfloat>"
_BF16_DOT = f"""
declare {_F} @llvm.x86.avx512bf16.dpbf16ps.512({_F}, {_B}, {_B})
define linkonce_odr {_F} @moec_dot2_16({_F} %acc, {_P} %a, {_P} %b) alwaysinline {{
  %x = bitcast {_P} %a to {_B}
  %y = bitcast {_P} %b to {_B}
  %r = call {_F} @llvm.x86.avx512bf16.dpbf16ps.512({_F} %acc, {_B} %x, {_B} %y)
  ret {_F} %r
}}
"""
