"""Scalars of torch's dtypes as TIR expressions: casts, rounding, memory, functions.

Half types compute in float32 and are rounded after every op, as eager does. TVM's own casts
to bf16 lose NaNs and are not allowed inside expressions, so memory and rounding go through
small always-inline LLVM functions (`moec.codegen.cpu.llvm.scalar_text`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.loops import index as ix
from moec.dtypes import FLOATS, HALVES, INTS, LONG_NAMES

COMPUTE = {
    name: "float32" if name in HALVES else long
    for name, long in LONG_NAMES.items()
    if name != "c64"
}
STORED = LONG_NAMES | {"c64": "float32"}
_MOST = 3.4028234663852886e38  # of float32; from halfway to the next power, rounding gives infinity
_INFINITE = 3.4028235677973366e38
_LIMITS = {"i64": 63, "i32": 31, "i16": 15, "i8": 7}


@dataclass(frozen=True)
class Scalar:
    """One element: its dtype in the IR, and its expression; for c64, (real, imaginary)."""

    dtype: str
    expr: Expr
    imag: Expr | None = None


Join: TypeAlias = Callable[[Scalar, Scalar], Scalar]
"""Combines two scalars, as a sum or an extreme does."""


def constant(value: bool | int | float, dtype: str) -> Scalar:
    """A number as torch stores it in a tensor of that dtype."""
    if dtype == "c64":
        return Scalar(dtype, T.float32(float(value)), T.float32(0.0))
    if dtype == "bool":
        return Scalar(dtype, tirx.const(bool(value), "bool"))
    if dtype in INTS:
        bits = 8 if dtype == "u8" else _LIMITS[dtype] + 1
        integer = int(value) & ((1 << bits) - 1)
        if dtype != "u8" and integer >> (bits - 1):
            integer -= 1 << bits
        return Scalar(dtype, tirx.const(integer, COMPUTE[dtype]))
    return Scalar(dtype, real(float(value), COMPUTE[dtype]))


def real(value: float, dtype: str = "float32") -> Expr:
    """A constant; a value without a decimal form is made from its bits."""
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
    """The least value: the start of a maximum."""
    if dtype in FLOATS:
        return constant(-math.inf, dtype)
    return constant(0 if dtype in ("u8", "bool") else -(1 << _LIMITS[dtype]), dtype)


def greatest(dtype: str) -> Scalar:
    if dtype in FLOATS:
        return constant(math.inf, dtype)
    high = {"u8": 255, "bool": 1}.get(dtype) or (1 << _LIMITS[dtype]) - 1
    return constant(high, dtype)


def cast(x: Scalar, dtype: str) -> Scalar:
    """Like `Tensor.to`: floats are truncated, integers wrap, and any nonzero value is True."""
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
        # TVM's bounds analysis takes a float cast from an integer for an integer.
        integer = ix.wide(expr if x.dtype == "i64" else T.cast(expr, "int64"))
        width = "64" if dtype == "f64" else "32"
        expr = T.call_extern(COMPUTE[dtype], f"moec_from_i64_{width}", integer)
    if expr.ty.dtype != COMPUTE[dtype]:
        expr = T.cast(expr, COMPUTE[dtype])
    return rounded(Scalar(dtype, expr))


def rounded(x: Scalar) -> Scalar:
    """For a half type, the float32 value after rounding to it."""
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
    """x has the buffer's dtype; bool buffers are viewed as int8."""
    if x.dtype == "c64":
        T.buffer_store(buffer, x.expr, [*index, 0])
        T.buffer_store(buffer, x.imag, [*index, 1])
    elif x.dtype in HALVES:
        where = T.address_of(buffer[tuple(index)])
        T.evaluate(T.call_extern("int32", f"moec_store_{x.dtype}", where, x.expr))
    else:
        T.buffer_store(buffer, T.cast(x.expr, "int8") if x.dtype == "bool" else x.expr, index)


def is_nan(x: Scalar) -> Expr:
    """By LLVM's comparison: TIR may assume that x equals x."""
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

    Floats are compared by LLVM, because TIR would turn "not a < b" into "a >= b".
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
    """One of the float32 functions of `moec.codegen.cpu.llvm.scalar_text`."""
    return T.call_extern("float32", f"moec_{name}_f32", *args)


def fmod(a: Scalar, b: Scalar) -> Expr:
    """The remainder of a division, with the sign of a."""
    width = "64" if a.dtype == "f64" else "32"
    return T.call_extern(COMPUTE[a.dtype], f"moec_fmod_{width}", a.expr, b.expr)


def add_in_any_order(a: Expr, b: Expr) -> Expr:
    """a + b in a sum that LLVM may reorder at compile time, to vectorise it."""
    width = "64" if a.ty.dtype == "float64" else "32"
    return T.call_extern(a.ty.dtype, f"moec_reassociate_{width}", a, b)
