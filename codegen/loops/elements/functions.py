"""Element-wise ops of one operand: functions, activations, casts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.loops import scalars as sc
from moec.codegen.loops.elements.arithmetic import choose, larger
from moec.codegen.loops.emission import Point
from moec.codegen.loops.rules import HEAVY, point
from moec.codegen.loops.scalars import Scalar
from moec.dtypes import FLOATS, INTS


def number(value: float, like: Scalar) -> Expr:
    return sc.constant(value, like.dtype).expr


def exp(x: Scalar) -> Expr:
    return T.exp(x.expr) if x.dtype == "f64" else sc.f32("exp", x.expr)


def tanh(x: Scalar) -> Expr:
    return T.tanh(x.expr) if x.dtype == "f64" else sc.f32("tanh", x.expr)


def erf(x: Scalar) -> Expr:
    return T.erf(x.expr) if x.dtype == "f64" else sc.f32("erf", x.expr)


def sigmoid(x: Scalar) -> Expr:
    one = number(1.0, x)
    return tirx.div(one, one + exp(Scalar(x.dtype, number(0.0, x) - x.expr)))


def log1p(p: Point, x: Scalar) -> Expr:
    """log(1 + x), exact up to rounding: between -1/3 and 1/2, where 1 + x loses digits of x, as the
    series of 2 atanh(x / (2 + x))."""
    bind = p.emission.bind_expr
    s = bind(tirx.div(x.expr, x.expr + number(2.0, x)))
    square = bind(s * s)
    last = 25 if x.dtype == "f64" else 11  # |s| <= 1/5
    series = number(1 / last, x)
    for odd in range(last - 2, 0, -2):
        series = series * square + number(1 / odd, x)
    u = bind(x.expr + number(1.0, x))
    far = T.Select(tirx.EQ(u, number(math.inf, x)), u, T.log(u))
    is_near = tirx.all(x.expr > number(-1 / 3, x), x.expr < number(0.5, x))
    return T.Select(is_near, s * series * number(2.0, x), far)


def expm1(p: Point, x: Scalar) -> Expr:
    """exp(x) - 1 by tanh(x/2), which is accurate for small x."""
    half = p.emission.bind(Scalar(x.dtype, x.expr * number(0.5, x)))
    t = p.emission.bind_expr(tanh(half))
    small = tirx.div(t + t, number(1.0, x) - t)
    return T.Select(sc.absolute(x).expr < number(0.5, x), small, exp(x) - number(1.0, x))


def _function(name: str, by: Callable[[Point, Scalar], Expr], cost: int = HEAVY) -> None:
    @point(name, cost=cost)
    def function(p: Point) -> Scalar:
        return Scalar(p.dtype, by(p, p.get(p["self"], p.dtype)))


_function("exp", lambda p, x: exp(x))
_function("expm1", expm1)
_function("log", lambda p, x: T.log(x.expr))
_function("log2", lambda p, x: T.log2(x.expr))
_function("log10", lambda p, x: T.log10(x.expr))
_function("log1p", log1p)
_function("sqrt", lambda p, x: T.sqrt(x.expr), cost=2)
_function("rsqrt", lambda p, x: tirx.div(number(1.0, x), T.sqrt(x.expr)), cost=4)
_function("reciprocal", lambda p, x: tirx.div(number(1.0, x), x.expr), cost=2)
_function("sin", lambda p, x: T.sin(x.expr))
_function("cos", lambda p, x: T.cos(x.expr))
_function("tan", lambda p, x: T.tan(x.expr))
_function("asin", lambda p, x: T.asin(x.expr))
_function("acos", lambda p, x: T.acos(x.expr))
_function("atan", lambda p, x: T.atan(x.expr))
_function("sinh", lambda p, x: T.sinh(x.expr))
_function("cosh", lambda p, x: T.cosh(x.expr))
_function("tanh", lambda p, x: tanh(x))
_function("erf", lambda p, x: erf(x))
_function("erfc", lambda p, x: number(1.0, x) - erf(x))
_function("sigmoid", lambda p, x: sigmoid(x))
_function("square", lambda p, x: x.expr * x.expr, cost=1)


@point("neg")
def neg(p: Point) -> Scalar:
    x = p.get(p["self"])
    zero = sc.constant(-0.0 if x.dtype in FLOATS else 0, x.dtype).expr
    return Scalar(x.dtype, zero - x.expr)


@point("abs", exact=True)
def abs_(p: Point) -> Scalar:
    return sc.absolute(p.get(p["self"]))


@point("sign", "sgn", exact=True)
def sign(p: Point) -> Scalar:
    x = p.get(p["self"])
    if x.dtype == "bool":
        return x
    zero, one = sc.constant(0, x.dtype).expr, sc.constant(1, x.dtype).expr
    falling = zero if x.dtype == "u8" else T.Select(x.expr < zero, zero - one, zero)
    return Scalar(x.dtype, T.Select(x.expr > zero, one, falling))


def _rounding(name: str, function: Callable[[Any], Any], llvm: str) -> None:
    @point(name, exact=True)
    def round_(p: Point) -> Scalar:
        x = p.get(p["self"])
        if x.dtype not in FLOATS:
            return x
        return Scalar(x.dtype, function(x.expr) if x.dtype == "f64" else sc.f32(llvm, x.expr))


_rounding("floor", T.floor, "floor")
_rounding("ceil", T.ceil, "ceil")
_rounding("trunc", T.trunc, "trunc")
_rounding("round", T.nearbyint, "roundeven")


@point("isnan", exact=True)
def isnan(p: Point) -> Scalar:
    return Scalar("bool", sc.is_nan(p.get(p["self"])))


@point("isinf", exact=True)
def isinf(p: Point) -> Scalar:
    x = p.get(p["self"])
    if x.dtype not in FLOATS:
        return sc.constant(False, "bool")
    return Scalar("bool", tirx.EQ(sc.absolute(x).expr, number(math.inf, x)))


# ---- activations -----------------------------------------------------------------------


@point("silu", cost=HEAVY)
def silu(p: Point) -> Scalar:
    x = p.get(p["self"])
    below = number(1.0, x) + exp(Scalar(x.dtype, number(0.0, x) - x.expr))
    return Scalar(x.dtype, tirx.div(x.expr, below))


@point("gelu", cost=HEAVY)
def gelu(p: Point) -> Scalar:
    x = p.get(p["self"])
    half = x.expr * number(0.5, x)
    if p["approximate"] == "tanh":
        cube = x.expr * x.expr * x.expr
        inner = (x.expr + cube * number(0.044715, x)) * number(math.sqrt(2 / math.pi), x)
        return Scalar(x.dtype, half * (number(1.0, x) + tanh(Scalar(x.dtype, inner))))
    inner = x.expr * number(math.sqrt(0.5), x)
    return Scalar(x.dtype, half * (number(1.0, x) + erf(Scalar(x.dtype, inner))))


@point("relu", exact=True)
def relu(p: Point) -> Scalar:
    x = p.get(p["self"])
    return larger(x, sc.constant(0, x.dtype))


@point("relu6", exact=True)
def relu6(p: Point) -> Scalar:
    x = p.get(p["self"])
    return larger(larger(x, sc.constant(0, x.dtype)), sc.constant(6, x.dtype), -1)


@point("leaky_relu")
def leaky_relu(p: Point) -> Scalar:
    x = p.get(p["self"])
    slope = number(float(p["negative_slope"]), x)
    return choose(x.expr > number(0.0, x), x, Scalar(x.dtype, x.expr * slope))


@point("elu", cost=HEAVY)
def elu(p: Point) -> Scalar:
    x = p.get(p["self"])
    alpha, scale, inner = (number(float(p[n]), x) for n in ("alpha", "scale", "input_scale"))
    below = expm1(p, p.emission.bind(Scalar(x.dtype, x.expr * inner))) * alpha
    y = T.Select(x.expr > number(0.0, x), x.expr, below)
    return Scalar(x.dtype, y * scale)


@point("softplus", cost=2 * HEAVY)
def softplus(p: Point) -> Scalar:
    x = p.get(p["self"])
    beta = number(float(p["beta"]), x)
    scaled = p.emission.bind(Scalar(x.dtype, x.expr * beta))
    grown = p.emission.bind(Scalar(x.dtype, exp(scaled)))
    soft = tirx.div(log1p(p, grown), beta)
    return Scalar(x.dtype, T.Select(scaled.expr > number(float(p["threshold"]), x), x.expr, soft))


@point("hardsigmoid", "hardswish")
def hardsigmoid(p: Point) -> Scalar:
    x = p.get(p["self"])
    shifted = Scalar(x.dtype, x.expr + number(3.0, x))
    clamp = larger(larger(shifted, sc.constant(0.0, x.dtype)), sc.constant(6.0, x.dtype), -1)
    share = tirx.div(clamp.expr, number(6.0, x))
    swish = p.op.name == "aten.hardswish.default"
    return Scalar(x.dtype, x.expr * share if swish else share)


# ---- casts and copies ------------------------------------------------------------------


@point("_to_copy", cost=0, exact=True)
def to_copy(p: Point) -> Scalar:
    return p.get(p["self"], p.dtype)


@point("copy", cost=0, exact=True)
def copy(p: Point) -> Scalar:
    return p.get(p["src"], p.dtype)


def _constant(*names: str, value: float | None = None, argument: str = "") -> None:
    @point(*names, cost=0, exact=True)
    def constant(p: Point) -> Scalar:
        if value is not None:
            return sc.constant(value, p.dtype)
        return sc.rounded(p.get(p[argument], p.dtype))


_constant(
    "zeros",
    "zeros_like",
    "new_zeros",
    "empty.memory_format",
    "empty_like",
    "new_empty",
    "empty_permuted",
    "new_empty_strided",
    "empty_strided",
    value=0,
)
_constant("ones", "ones_like", "new_ones", value=1)
_constant("full", "full_like", "new_full", argument="fill_value")
_constant("scalar_tensor", argument="s")
_constant("fill.Scalar", "fill.Tensor", argument="value")


@point("arange", "arange.start", "arange.start_step", cost=0, exact=True, same_position=False)
def arange(p: Point) -> Scalar:
    named = p.emission.named(p.op)
    start, step = named.get("start", 0), named.get("step", 1)
    position = Scalar("i64", p.at[0].expr)
    if start == 0 and step == 1:
        return sc.cast(position, p.dtype)
    if p.dtype in INTS:
        exprs = [p.emission.sizes.expr(v) for v in (start, step)]
        return sc.cast(Scalar("i64", exprs[0] + position.expr * exprs[1]), p.dtype)
    wide = sc.cast(position, "f64").expr
    first, by = (p.get(v, "f64").expr for v in (start, step))
    return sc.cast(Scalar("f64", first + wide * by), p.dtype)


@point("eye", "eye.m", cost=0, exact=True, same_position=False)
def eye(p: Point) -> Scalar:
    return sc.cast(Scalar("bool", tirx.EQ(p.at[0].expr, p.at[1].expr)), p.dtype)
