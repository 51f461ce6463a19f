"""Scalars of torch's dtypes as TIR expressions: casts, rounding, memory, functions.

Half types compute in float32 and are rounded after every op, as eager does. TVM's own casts
to bf16 lose NaNs and are not allowed inside expressions, so memory and rounding go through
small always-inline LLVM functions, which LLVM vectorises with the loop around them.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cache

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.generic import index as ix
from moec.codegen.polynomials import ERF_P, ERF_Q, TANH_P, TANH_Q
from moec.target import Target

COMPUTE = {
    "f32": "float32",
    "bf16": "float32",
    "f16": "float32",
    "f64": "float64",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u8": "uint8",
    "bool": "bool",
}
STORED = COMPUTE | {"bf16": "bfloat16", "f16": "float16", "c64": "float32"}
FLOATS = ("f32", "bf16", "f16", "f64")
INTS = ("i64", "i32", "i16", "i8", "u8")
HALVES = ("bf16", "f16")
_MOST = 3.4028234663852886e38  # of float32; from halfway to the next power on it is infinity
_INFINITE = 3.4028235677973366e38
_LIMITS = {"i64": 63, "i32": 31, "i16": 15, "i8": 7}


@dataclass(frozen=True)
class Scalar:
    """One element: its dtype of the IR, and the expression; of c64, (real, imaginary)."""

    dtype: str
    expr: Expr
    imag: Expr | None = None


def constant(value: bool | int | float, dtype: str) -> Scalar:
    """A number as torch stores it in a tensor of that dtype."""
    if dtype == "c64":
        return Scalar(dtype, T.float32(float(value)), T.float32(0.0))
    if dtype == "bool":
        return Scalar(dtype, tirx.const(bool(value), "bool"))
    if dtype in INTS:
        bits = 8 if dtype == "u8" else _LIMITS[dtype] + 1
        whole = int(value) & ((1 << bits) - 1)
        if dtype != "u8" and whole >> (bits - 1):
            whole -= 1 << bits
        return Scalar(dtype, tirx.const(whole, COMPUTE[dtype]))
    return Scalar(dtype, real(float(value), COMPUTE[dtype]))


def real(value: float, dtype: str = "float32") -> Expr:
    """A constant; those that have no decimal form are made from their bits."""
    if dtype == "float32" and _MOST < abs(value) < _INFINITE:
        value = math.copysign(_MOST, value)
    if math.isfinite(value) and (dtype == "float64" or abs(value) <= _MOST):
        return tirx.const(value, dtype)
    if dtype == "float64":
        bits = struct.unpack("<q", struct.pack("<d", value))[0]
        return T.reinterpret("float64", tirx.const(bits, "int64"))
    if math.isfinite(value):
        value = math.copysign(math.inf, value)
    bits = struct.unpack("<i", struct.pack("<f", value))[0]
    return T.reinterpret("float32", tirx.const(bits, "int32"))


def lowest(dtype: str) -> Scalar:
    """The least value: what a maximum starts from."""
    if dtype in FLOATS:
        return constant(-math.inf, dtype)
    return constant(0 if dtype in ("u8", "bool") else -(1 << _LIMITS[dtype]), dtype)


def greatest(dtype: str) -> Scalar:
    if dtype in FLOATS:
        return constant(math.inf, dtype)
    high = {"u8": 255, "bool": 1}.get(dtype) or (1 << _LIMITS[dtype]) - 1
    return constant(high, dtype)


def cast(x: Scalar, dtype: str) -> Scalar:
    """As `Tensor.to`: floats are cut towards zero, integers wrap, anything but 0 is True."""
    if x.dtype == dtype:
        return x
    if dtype == "c64":
        return Scalar(dtype, cast(x, "f32").expr, T.float32(0.0))
    if x.dtype == "c64":
        return cast(Scalar("f32", x.expr), dtype)
    if dtype == "bool":
        return Scalar(dtype, compare("ne", x, constant(0, x.dtype)))
    expr = x.expr
    if dtype in INTS and x.dtype in FLOATS:
        expr = T.cast(expr, "int64")
    elif dtype == "f32" and x.dtype == "f64":
        expr = T.cast(expr, "float32")
    elif dtype in FLOATS and x.dtype not in FLOATS:
        # TVM's bounds analysis takes a cast from a whole number for a whole number.
        whole = ix.wide(expr if x.dtype == "i64" else T.cast(expr, "int64"))
        width = "64" if dtype == "f64" else "32"
        expr = T.call_extern(COMPUTE[dtype], f"moec_from_i64_{width}", whole)
    if expr.ty.dtype != COMPUTE[dtype]:
        expr = T.cast(expr, COMPUTE[dtype])
    return rounded(Scalar(dtype, expr))


def rounded(x: Scalar) -> Scalar:
    """Of a half type: the float32 that memory would give back."""
    if x.dtype not in HALVES:
        return x
    return Scalar(x.dtype, T.call_extern("float32", f"moec_round_{x.dtype}", x.expr))


def load(buffer: Buffer, index: list[Expr], dtype: str) -> Scalar:
    if dtype == "c64":
        return Scalar(dtype, buffer[(*index, 0)], buffer[(*index, 1)])
    if dtype in HALVES:
        where = T.address_of(buffer[tuple(index)])
        return Scalar(dtype, T.call_extern("float32", f"moec_load_{dtype}", where))
    element = buffer[tuple(index)]
    return Scalar(dtype, tirx.NE(element, tirx.const(0, "int8")) if dtype == "bool" else element)


def store(buffer: Buffer, index: list[Expr], x: Scalar) -> None:
    """x has the buffer's dtype; bool buffers are seen as int8."""
    if x.dtype == "c64":
        T.buffer_store(buffer, x.expr, [*index, 0])
        T.buffer_store(buffer, x.imag, [*index, 1])
    elif x.dtype in HALVES:
        where = T.address_of(buffer[tuple(index)])
        T.evaluate(T.call_extern("int32", f"moec_store_{x.dtype}", where, x.expr))
    else:
        T.buffer_store(buffer, T.cast(x.expr, "int8") if x.dtype == "bool" else x.expr, index)


def is_nan(x: Scalar) -> Expr:
    """By LLVM's own comparison: TIR is free to think that x equals x."""
    if x.dtype not in FLOATS:
        return tirx.const(False, "bool")
    width = "64" if x.dtype == "f64" else "32"
    return tirx.NE(T.call_extern("int32", f"moec_isnan_{width}", x.expr), tirx.const(0, "int32"))


_COMPARE = {
    "eq": tirx.EQ,
    "ne": tirx.NE,
    "lt": tirx.LT,
    "le": tirx.LE,
    "gt": tirx.GT,
    "ge": tirx.GE,
}


def compare(how: str, a: Scalar, b: Scalar) -> Expr:
    """eq, ne, lt, le, gt or ge of two elements of one dtype; NaN is not equal to anything.

    Floats are compared by LLVM: TIR would turn "not a < b" into "a >= b".
    """
    if a.dtype == "bool":
        a, b = cast(a, "i8"), cast(b, "i8")
    if a.dtype not in FLOATS:
        return _COMPARE[how](a.expr, b.expr)
    width = "64" if a.dtype == "f64" else "32"
    return tirx.NE(T.call_extern("int32", f"moec_{how}_{width}", a.expr, b.expr), T.int32(0))


def absolute(x: Scalar) -> Scalar:
    if x.dtype in ("u8", "bool"):
        return x
    if x.dtype == "c64":
        assert x.imag is not None
        return Scalar("f32", T.sqrt(x.expr * x.expr + x.imag * x.imag))
    if COMPUTE[x.dtype] == "float32":
        return Scalar(x.dtype, f32("fabs", x.expr))
    zero = tirx.const(0, COMPUTE[x.dtype])
    return Scalar(x.dtype, T.Select(x.expr < zero, zero - x.expr, x.expr))


def f32(name: str, *args: Expr) -> Expr:
    """One of the float32 functions below."""
    return T.call_extern("float32", f"moec_{name}_f32", *args)


def fmod(a: Scalar, b: Scalar) -> Expr:
    """The rest of a division, with the sign of a."""
    width = "64" if a.dtype == "f64" else "32"
    return T.call_extern(COMPUTE[a.dtype], f"moec_fmod_{width}", a.expr, b.expr)


def add_in_any_order(a: Expr, b: Expr) -> Expr:
    """a + b of a sum whose order LLVM may choose (once, when it compiles), to vectorise it."""
    width = "64" if a.ty.dtype == "float64" else "32"
    return T.call_extern(a.ty.dtype, f"moec_reassociate_{width}", a, b)


def _hex(value: float) -> str:
    """A float32 constant as LLVM reads it."""
    single = struct.unpack("<f", struct.pack("<f", value))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', single))[0]:016X}"


@cache
def llvm_functions(target: Target) -> str:
    """The text that `pragma_import_llvm` takes."""
    return "\n".join([_fma(target), _bf16(target), _f16(target), _plain(), _exp(), _tanh(), _erf()])


def _fma(target: Target) -> str:
    """a * b + c; a library call where the target has no such instruction, so not there."""
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


def _bf16(target: Target) -> str:
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


def _f16(target: Target) -> str:
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
  %m3 = fmul float %m2, {_hex(2.0**112)}
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
  %none = icmp slt i64 %b, 1
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


# exp(r) = 1 + r + r^2 q(r) for |r| <= ln(2)/2, from Cephes (expf.c).
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)


def _horner(name: str, coefficients: tuple[float, ...], x: str) -> str:
    lines = []
    value = _hex(coefficients[0])
    for step, c in enumerate(coefficients[1:]):
        lines.append(
            f"  %{name}{step} = call float @moec_fma_f32(float {value}, float {x}, float {_hex(c)})"
        )
        value = f"%{name}{step}"
    return "\n".join(lines)


def _exp() -> str:
    """exp to about 1 ulp, with exact infinities and zeros; NaN passes through."""
    fma = "call float @moec_fma_f32"
    return f"""
define linkonce_odr float @moec_exp_f32(float %x0) alwaysinline {{
  %hi = fcmp ogt float %x0, {_hex(89.0)}
  %x1 = select i1 %hi, float {_hex(89.0)}, float %x0
  %lo = fcmp olt float %x1, {_hex(-104.0)}
  %x = select i1 %lo, float {_hex(-104.0)}, float %x1
  %t = {fma}(float %x, float {_hex(1.4426950408889634)}, float {_hex(12582912.0)})
  %k = fsub float %t, {_hex(12582912.0)}
  %r0 = {fma}(float %k, float {_hex(-0.693359375)}, float %x)
  %r = {fma}(float %k, float {_hex(2.12194440e-4)}, float %r0)
{_horner("q", _EXP, "%r")}
  %r2 = fmul float %r, %r
  %p0 = {fma}(float %q{len(_EXP) - 2}, float %r2, float %r)
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
  %hi = fcmp ogt float %x0, {_hex(limit)}
  %x1 = select i1 %hi, float {_hex(limit)}, float %x0
  %lo = fcmp olt float %x1, {_hex(-limit)}
  %x = select i1 %lo, float {_hex(-limit)}, float %x1
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
