"""The LLVM functions that scalar expressions call: memory, rounding, comparison, exp, tanh, erf.

All are always inlined, and LLVM vectorises them with the loop around them.
"""

from __future__ import annotations

from functools import cache

from moec.codegen.cpu.llvm.constants import ERF_P, ERF_Q, EXP, TANH_P, TANH_Q, f32
from moec.target.cpu import CpuTarget


@cache
def scalar_functions(target: CpuTarget) -> str:
    return "\n".join([_fma(target), _bf16(target), _f16(target), _plain(), _exp(), _tanh(), _erf()])


def _fma(target: CpuTarget) -> str:
    """a * b + c, fused only if the target has an instruction: otherwise it is a library call."""
    body = (
        "  %r = call float @llvm.fma.f32(float %a, float %b, float %c)"
        if target.fma
        else "  %m = fmul contract float %a, %b\n  %r = fadd contract float %m, %c"
    )
    return f"""declare float @llvm.fma.f32(float, float, float)
define linkonce_odr float @moec_fma_f32(float %a, float %b, float %c) alwaysinline {{
{body}
  ret float %r
}}"""


def _half(name: str, widen: str, narrow: str) -> str:
    return f"""
define linkonce_odr float @moec_load_{name}(ptr %p) alwaysinline {{
  %e = load i16, ptr %p, align 2
{widen}
  ret float %f
}}
define linkonce_odr i32 @moec_store_{name}(ptr %p, float %x) alwaysinline {{
{narrow}
  store i16 %e, ptr %p, align 2
  ret i32 0
}}
define linkonce_odr float @moec_round_{name}(float %x) alwaysinline {{
{narrow}
{widen}
  ret float %f
}}"""


def _bf16(target: CpuTarget) -> str:
    widen = """  %w = zext i16 %e to i32
  %s = shl i32 %w, 16
  %f = bitcast i32 %s to float"""
    if "avx512bf16" in target.features:
        narrow = "  %h = fptrunc float %x to bfloat\n  %e = bitcast bfloat %h to i16"
    else:  # to nearest, ties to even; a NaN stays one
        narrow = """  %b = bitcast float %x to i32
  %t = lshr i32 %b, 16
  %o = and i32 %t, 1
  %r1 = add i32 %b, 32767
  %r2 = add i32 %r1, %o
  %r3 = lshr i32 %r2, 16
  %q = or i32 %t, 64
  %n = fcmp uno float %x, 0.0
  %k = select i1 %n, i32 %q, i32 %r3
  %e = trunc i32 %k to i16"""
    return _half("bf16", widen, narrow)


def _f16(target: CpuTarget) -> str:
    if target.f16_convert:
        return _half(
            "f16",
            "  %v = bitcast i16 %e to half\n  %f = fpext half %v to float",
            "  %h = fptrunc float %x to half\n  %e = bitcast half %h to i16",
        )
    # Moving the bits up and scaling by 2^112 is right for subnormals too; infinity and NaN
    # need the greatest exponent put back.
    widen = f"""  %w = zext i16 %e to i32
  %s0 = and i32 %w, {0x8000}
  %s = shl i32 %s0, 16
  %m0 = and i32 %w, {0x7FFF}
  %m1 = shl i32 %m0, 13
  %m2 = bitcast i32 %m1 to float
  %m3 = fmul float %m2, {f32(2.0**112)}
  %m4 = bitcast float %m3 to i32
  %big = icmp uge i32 %m0, {0x7C00}
  %top = or i32 %m1, {0x7F800000}
  %m5 = select i1 %big, i32 %top, i32 %m4
  %m6 = or i32 %m5, %s
  %f = bitcast i32 %m6 to float"""
    # Subnormal halves: adding 0.5 rounds the value to a multiple of 2^-24 in the low bits.
    narrow = f"""  %b = bitcast float %x to i32
  %a = and i32 %b, {0x7FFFFFFF}
  %g0 = xor i32 %b, %a
  %g = lshr i32 %g0, 16
  %o0 = lshr i32 %a, 13
  %o = and i32 %o0, 1
  %n1 = add i32 %a, {0xFFF - (112 << 23)}
  %n2 = add i32 %n1, %o
  %n3 = lshr i32 %n2, 13
  %d0 = bitcast i32 %a to float
  %d1 = fadd float %d0, 0.5
  %d2 = bitcast float %d1 to i32
  %d3 = sub i32 %d2, {0x3F000000}
  %small = icmp ult i32 %a, {113 << 23}
  %k0 = select i1 %small, i32 %d3, i32 %n3
  %over = icmp uge i32 %a, {0x477FF000}
  %k1 = select i1 %over, i32 {0x7C00}, i32 %k0
  %nan = icmp ugt i32 %a, {0x7F800000}
  %k2 = select i1 %nan, i32 {0x7E00}, i32 %k1
  %k3 = or i32 %k2, %g
  %e = trunc i32 %k3 to i16"""
    return _half("f16", widen, narrow)


def _plain() -> str:
    parts = []
    for name in ("maximum", "minimum"):
        parts.append(f"""
declare float @llvm.{name}.f32(float, float)
define linkonce_odr float @moec_{name}_f32(float %a, float %b) alwaysinline {{
  %r = call float @llvm.{name}.f32(float %a, float %b)
  ret float %r
}}""")
    for name in ("sqrt", "fabs", "floor", "ceil", "trunc", "roundeven"):
        parts.append(f"""
declare float @llvm.{name}.f32(float)
define linkonce_odr float @moec_{name}_f32(float %a) alwaysinline {{
  %r = call float @llvm.{name}.f32(float %a)
  ret float %r
}}""")
    for width, kind in (("32", "float"), ("64", "double")):
        parts.append(f"""
define linkonce_odr {kind} @moec_reassociate_{width}({kind} %a, {kind} %b) alwaysinline {{
  %r = fadd reassoc {kind} %a, %b
  ret {kind} %r
}}
define linkonce_odr i32 @moec_isnan_{width}({kind} %a) alwaysinline {{
  %n = fcmp uno {kind} %a, 0.0
  %r = zext i1 %n to i32
  ret i32 %r
}}
define linkonce_odr {kind} @moec_from_i64_{width}(i64 %a) alwaysinline {{
  %r = sitofp i64 %a to {kind}
  ret {kind} %r
}}
define linkonce_odr {kind} @moec_fmod_{width}({kind} %a, {kind} %b) alwaysinline {{
  %r = frem {kind} %a, %b
  ret {kind} %r
}}
define linkonce_odr {kind} @moec_mul_{width}({kind} %a, {kind} %b) alwaysinline {{
  %r = fmul {kind} %a, %b
  ret {kind} %r
}}""")
        for how in ("oeq", "une", "olt", "ole", "ogt", "oge"):
            parts.append(f"""
define linkonce_odr i32 @moec_{how[1:]}_{width}({kind} %a, {kind} %b) alwaysinline {{
  %c = fcmp {how} {kind} %a, %b
  %r = zext i1 %c to i32
  ret i32 %r
}}""")
    parts.append("""
define linkonce_odr i64 @moec_zero_i64() alwaysinline {
  ret i64 0
}
define linkonce_odr i64 @moec_divisor_i64(i64 %b) alwaysinline {
  %none = icmp eq i64 %b, 0
  %c = select i1 %none, i64 1, i64 %b
  ret i64 %c
}""")
    for name, how in (("quotient", "sdiv"), ("rest", "srem")):
        parts.append(f"""
define linkonce_odr i64 @moec_{name}_i64(i64 %a, i64 %b) alwaysinline {{
  %none = icmp slt i64 %b, 1
  %c = select i1 %none, i64 1, i64 %b
  %r = {how} i64 %a, %c
  ret i64 %r
}}""")
    return "".join(parts)


def _horner(name: str, coefficients: tuple[float, ...], x: str) -> str:
    lines = []
    value = f32(coefficients[0])
    for step, c in enumerate(coefficients[1:]):
        lines.append(
            f"  %{name}{step} = call float @moec_fma_f32(float {value}, float {x}, float {f32(c)})"
        )
        value = f"%{name}{step}"
    return "\n".join(lines)


def _exp() -> str:
    """exp to about 1 ulp, with exact infinities and zeros; NaN passes through."""
    fma = "call float @moec_fma_f32"
    return f"""
define linkonce_odr float @moec_exp_f32(float %x0) alwaysinline {{
  %hi = fcmp ogt float %x0, {f32(89.0)}
  %x1 = select i1 %hi, float {f32(89.0)}, float %x0
  %lo = fcmp olt float %x1, {f32(-104.0)}
  %x = select i1 %lo, float {f32(-104.0)}, float %x1
  %t = {fma}(float %x, float {f32(1.4426950408889634)}, float {f32(12582912.0)})
  %k = fsub float %t, {f32(12582912.0)}
  %r0 = {fma}(float %k, float {f32(-0.693359375)}, float %x)
  %r = {fma}(float %k, float {f32(2.12194440e-4)}, float %r0)
{_horner("q", EXP, "%r")}
  %r2 = fmul float %r, %r
  %p0 = {fma}(float %q{len(EXP) - 2}, float %r2, float %r)
  %p = fadd float %p0, 1.0
  %tb = bitcast float %t to i32
  %ki = sub i32 %tb, {0x4B400000}
  %k1 = ashr i32 %ki, 1
  %k2 = sub i32 %ki, %k1
  %e1 = add i32 %k1, 127
  %e2 = add i32 %k2, 127
  %s1 = shl i32 %e1, 23
  %s2 = shl i32 %e2, 23
  %f1 = bitcast i32 %s1 to float
  %f2 = bitcast i32 %s2 to float
  %y1 = fmul float %p, %f1
  %y = fmul float %y1, %f2
  ret float %y
}}"""


def _rational(name: str, limit: float, p: tuple[float, ...], q: tuple[float, ...]) -> str:
    top, bottom = f"%p{len(p) - 2}", f"%q{len(q) - 2}"
    return f"""
define linkonce_odr float @moec_{name}_f32(float %x0) alwaysinline {{
  %hi = fcmp ogt float %x0, {f32(limit)}
  %x1 = select i1 %hi, float {f32(limit)}, float %x0
  %lo = fcmp olt float %x1, {f32(-limit)}
  %x = select i1 %lo, float {f32(-limit)}, float %x1
  %s = fmul float %x, %x
{_horner("p", p, "%s")}
{_horner("q", q, "%s")}
  %n = fmul float %x, {top}
  %y = fdiv float %n, {bottom}
  ret float %y
}}"""


def _tanh() -> str:
    return _rational("tanh", 7.90531110763549805, TANH_P, TANH_Q)


def _erf() -> str:
    return _rational("erf", 4.0, ERF_P, ERF_Q)


DIVIDE = """
define linkonce_odr i64 @moec_quotient(i64 %a, i64 %b) alwaysinline {
  %none = icmp slt i64 %b, 1
  %c = select i1 %none, i64 1, i64 %b
  %r = udiv i64 %a, %c
  ret i64 %r
}
"""
