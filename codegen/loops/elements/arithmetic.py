"""Element-wise ops of two operands: arithmetic, comparison, logic, choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.loops import scalars as sc
from moec.codegen.loops.emission import Point
from moec.codegen.loops.rules import HEAVY, common_dtype, point
from moec.codegen.loops.scalars import Scalar
from moec.dtypes import FLOATS, INTS


def operands(p: Point, first: str = "self", second: str = "other") -> tuple[Scalar, Scalar]:
    """Both operands in the dtype that torch computes in."""
    dtype = common_dtype(p[first], p[second])
    return p.get(p[first], dtype), p.get(p[second], dtype)


def result(p: Point, x: Scalar) -> Scalar:
    return sc.cast(x, p.dtype)


def times(a: Scalar, b: Scalar) -> Scalar:
    if a.dtype == "c64":
        assert a.imag is not None
        assert b.imag is not None
        real = a.expr * b.expr - a.imag * b.imag
        return Scalar("c64", real, a.expr * b.imag + a.imag * b.expr)
    if a.dtype == "bool":
        return Scalar("bool", tirx.And(a.expr, b.expr))
    if a.dtype in FLOATS and any(isinstance(s.expr, tirx.FloatImm) for s in (a, b)):
        # TIR folds x * 0 to 0 even where x is NaN or infinite.
        width = "64" if a.dtype == "f64" else "32"
        expr = T.call_extern(sc.COMPUTE[a.dtype], f"moec_mul_{width}", a.expr, b.expr)
        return Scalar(a.dtype, expr)
    return Scalar(a.dtype, a.expr * b.expr)


def plus(a: Scalar, b: Scalar, sign: int = 1) -> Scalar:
    if a.dtype == "bool":
        return Scalar("bool", tirx.Or(a.expr, b.expr))
    if sign < 0:
        imag = None if a.imag is None else a.imag - b.imag
        return Scalar(a.dtype, a.expr - b.expr, imag)
    return Scalar(a.dtype, a.expr + b.expr, None if a.imag is None else a.imag + b.imag)


def _scaled(p: Point, x: Scalar, alpha: Any) -> Scalar:
    return x if alpha == 1 else times(x, p.get(alpha, x.dtype))


@point("add.Tensor", "add.Scalar")
def add(p: Point) -> Scalar:
    a, b = operands(p)
    return result(p, plus(a, _scaled(p, b, p["alpha"])))


@point("sub.Tensor", "sub.Scalar")
def sub(p: Point) -> Scalar:
    a, b = operands(p)
    return result(p, plus(a, _scaled(p, b, p["alpha"]), -1))


@point("rsub.Tensor", "rsub.Scalar")
def rsub(p: Point) -> Scalar:
    a, b = operands(p)
    return result(p, plus(b, _scaled(p, a, p["alpha"]), -1))


@point("mul.Tensor", "mul.Scalar")
def mul(p: Point) -> Scalar:
    return result(p, times(*operands(p)))


@point("addcmul")
def addcmul(p: Point) -> Scalar:
    x, a, b = (p.get(p[name], p.dtype) for name in ("self", "tensor1", "tensor2"))
    return plus(x, times(_scaled(p, a, p["value"]), b))


@point("addcdiv")
def addcdiv(p: Point) -> Scalar:
    x, a, b = (p.get(p[name], p.dtype) for name in ("self", "tensor1", "tensor2"))
    return plus(x, Scalar(p.dtype, tirx.div(_scaled(p, a, p["value"]).expr, b.expr)))


@point("lerp.Scalar", "lerp.Tensor")
def lerp(p: Point) -> Scalar:
    a, b, w = (p.get(p[name], p.dtype) for name in ("self", "end", "weight"))
    near = a.expr + w.expr * (b.expr - a.expr)
    far = b.expr - (b.expr - a.expr) * (1 - w.expr)
    close = sc.absolute(w).expr < sc.constant(0.5, p.dtype).expr
    return Scalar(p.dtype, _select(close, Scalar(p.dtype, near), Scalar(p.dtype, far)))


# ---- division --------------------------------------------------------------------------

Divide = Callable[[Expr, Expr], Expr]


def _integer_division(p: Point, divide: Divide, a: Scalar, b: Scalar, of_minus_one: Expr) -> Scalar:
    """A quotient or remainder of integers, by a division that never traps. Eager raises for a
    divisor of 0, so then any result will do. The least integer divided by -1 overflows, so -1 is
    handled separately."""
    if isinstance(b.expr, tirx.IntImm):
        answer = {0: a.expr, -1: of_minus_one}.get(b.expr.value)
        return Scalar(a.dtype, divide(a.expr, b.expr) if answer is None else answer)
    one = sc.constant(1, b.dtype).expr
    traps = tirx.EQ(b.expr, one - one)
    if b.dtype in ("u8", "bool"):
        divisor = p.emission.bind_expr(T.Select(traps, one, b.expr))
        return Scalar(a.dtype, divide(a.expr, divisor))
    minus = p.emission.bind_expr(tirx.EQ(b.expr, sc.constant(-1, b.dtype).expr))
    divisor = p.emission.bind_expr(T.Select(tirx.Or(traps, minus), one, b.expr))
    return Scalar(a.dtype, T.Select(minus, of_minus_one, divide(a.expr, divisor)))


def _integer_quotient(p: Point, divide: Divide, a: Scalar, b: Scalar) -> Scalar:
    return _integer_division(p, divide, a, b, sc.constant(0, a.dtype).expr - a.expr)


def _integer_remainder(p: Point, divide: Divide, a: Scalar, b: Scalar) -> Scalar:
    return _integer_division(p, divide, a, b, sc.constant(0, a.dtype).expr)


def _differ(a: Expr, b: Expr) -> Expr:
    return tirx.NE(T.cast(a, "int8"), T.cast(b, "int8"))


def floor_quotient(p: Point, a: Scalar, b: Scalar) -> Scalar:
    if a.dtype in INTS:
        return _integer_quotient(p, tirx.floordiv, a, b)
    bind = p.emission.bind_expr
    rest = bind(sc.fmod(a, b))
    zero = sc.constant(0.0, a.dtype).expr
    exact = bind(tirx.div(a.expr - rest, b.expr))
    wrong = tirx.And(tirx.NE(rest, zero), _differ(rest < zero, b.expr < zero))
    down = bind(T.Select(wrong, exact - 1, exact))
    integer = bind(T.floor(down))
    near = T.Select(down - integer > sc.constant(0.5, a.dtype).expr, integer + 1, integer)
    return Scalar(a.dtype, T.Select(tirx.EQ(b.expr, zero), tirx.div(a.expr, b.expr), near))


def remainder_of(p: Point, a: Scalar, b: Scalar) -> Scalar:
    """The remainder, with the sign of b."""
    if a.dtype in INTS:
        return _integer_remainder(p, tirx.floormod, a, b)
    zero = sc.constant(0.0, a.dtype).expr
    rest = p.emission.bind_expr(sc.fmod(a, b))
    wrong = tirx.And(tirx.NE(rest, zero), _differ(rest < zero, b.expr < zero))
    return Scalar(a.dtype, _select(wrong, Scalar(a.dtype, rest + b.expr), Scalar(a.dtype, rest)))


@point("div.Tensor", "div.Scalar", cost=2)
def div(p: Point) -> Scalar:
    dtype = common_dtype(p["self"], p["other"])
    dtype = dtype if dtype in (*FLOATS, "c64") else p.dtype
    a, b = p.get(p["self"], dtype), p.get(p["other"], dtype)
    return result(p, Scalar(dtype, tirx.div(a.expr, b.expr)))


@point("div.Tensor_mode", "div.Scalar_mode", cost=4)
def div_mode(p: Point) -> Scalar:
    mode = p["rounding_mode"]
    if mode is None:
        return div(p)
    a, b = operands(p)
    if mode == "floor":
        return result(p, floor_quotient(p, a, b))
    if a.dtype in INTS:
        return result(p, _integer_quotient(p, tirx.truncdiv, a, b))
    quotient = sc.rounded(Scalar(a.dtype, tirx.div(a.expr, b.expr)))
    return result(p, Scalar(a.dtype, T.trunc(quotient.expr)))


@point("floor_divide", "floor_divide.Scalar", cost=4)
def floor_divide(p: Point) -> Scalar:
    return result(p, floor_quotient(p, *operands(p)))


@point("remainder.Tensor", "remainder.Scalar", "remainder.Scalar_Tensor", cost=4)
def remainder(p: Point) -> Scalar:
    return result(p, remainder_of(p, *operands(p)))


@point("fmod.Tensor", "fmod.Scalar", cost=4)
def fmod(p: Point) -> Scalar:
    a, b = operands(p)
    if a.dtype in INTS:
        return result(p, _integer_remainder(p, tirx.truncmod, a, b))
    return result(p, Scalar(a.dtype, sc.fmod(a, b)))


# ---- powers ----------------------------------------------------------------------------


@point("pow.Tensor_Scalar", cost=2)
def pow_scalar(p: Point) -> Scalar:
    exponent = p["exponent"]
    x = p.get(p["self"], p.dtype)
    if exponent in (2, 3):
        y = times(x, x)
        return y if exponent == 2 else times(y, x)
    if p.dtype in FLOATS:
        one = sc.constant(1.0, p.dtype).expr
        if exponent == 0.5:
            return Scalar(p.dtype, T.sqrt(x.expr))
        if exponent == -0.5:
            return Scalar(p.dtype, tirx.div(one, T.sqrt(x.expr)))
        if exponent in (-1, -2):
            below = x if exponent == -1 else times(x, x)
            return Scalar(p.dtype, tirx.div(one, below.expr))
        if exponent == 1:
            return x
        return Scalar(p.dtype, T.pow(x.expr, sc.constant(exponent, p.dtype).expr))
    return _whole_power(p, x, int(exponent))


def _whole_power(p: Point, x: Scalar, exponent: int) -> Scalar:
    power = sc.constant(1, x.dtype)
    square = x
    while exponent > 0:
        if exponent & 1:
            power = p.emission.bind(times(power, square))
        square = p.emission.bind(times(square, square))
        exponent >>= 1
    return power


@point("pow.Tensor_Tensor", "pow.Scalar", cost=HEAVY)
def pow_tensor(p: Point) -> Scalar:
    a, b = operands(p, "self", "exponent")
    if a.dtype in FLOATS:
        return result(p, Scalar(a.dtype, T.pow(a.expr, b.expr)))
    # Exact as long as the result is below 2^53.
    power = T.pow(T.cast(a.expr, "float64"), T.cast(b.expr, "float64"))
    return result(p, Scalar("f64", power))


@point("atan2", cost=HEAVY)
def atan2(p: Point) -> Scalar:
    a, b = p.get(p["self"], p.dtype), p.get(p["other"], p.dtype)
    return Scalar(p.dtype, T.atan2(a.expr, b.expr))


# ---- comparison and choice -------------------------------------------------------------


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):

    @point(f"{_name}.Tensor", f"{_name}.Scalar", exact=True)
    def compare(p: Point, how: str = _name) -> Scalar:
        return Scalar("bool", sc.compare(how, *operands(p)))


def larger(a: Scalar, b: Scalar, sign: int = 1) -> Scalar:
    """The maximum (sign 1) or minimum (-1); NaN if either operand is, as in torch."""
    if sc.COMPUTE[a.dtype] == "float32":
        return Scalar(a.dtype, sc.f32("maximum" if sign > 0 else "minimum", a.expr, b.expr))
    if a.dtype == "bool":
        return Scalar("bool", (tirx.Or if sign > 0 else tirx.And)(a.expr, b.expr))
    wins = tirx.GT(a.expr, b.expr) if sign > 0 else tirx.LT(a.expr, b.expr)
    if a.dtype == "f64":
        wins = tirx.Or(wins, sc.is_nan(a))
    return Scalar(a.dtype, _select(wins, a, b))


@point("maximum", exact=True)
def maximum(p: Point) -> Scalar:
    return result(p, larger(*operands(p)))


@point("minimum", exact=True)
def minimum(p: Point) -> Scalar:
    return result(p, larger(*operands(p), -1))


@point("clamp", "clamp.Tensor", "hardtanh")
def clamp(p: Point) -> Scalar:
    names = ("min_val", "max_val") if p.op.name == "aten.hardtanh.default" else ("min", "max")
    x = p.get(p["self"], p.dtype)
    for name, sign in zip(names, (1, -1), strict=True):
        if p[name] is not None:
            x = larger(x, p.get(p[name], p.dtype), sign)
    return x


@point("clamp_min", "clamp_min.Tensor")
def clamp_min(p: Point) -> Scalar:
    return larger(p.get(p["self"], p.dtype), p.get(p["min"], p.dtype))


@point("clamp_max", "clamp_max.Tensor")
def clamp_max(p: Point) -> Scalar:
    return larger(p.get(p["self"], p.dtype), p.get(p["max"], p.dtype), -1)


def choose(condition: Expr, a: Scalar, b: Scalar) -> Scalar:
    imag = None if a.imag is None else T.Select(condition, a.imag, b.imag)
    return Scalar(a.dtype, _select(condition, a, b), imag)


_BITS = {"float32": "int32", "float64": "int64"}


def _select(condition: Expr, a: Scalar, b: Scalar) -> Expr:
    """Selects floats through the integers of their bits: TVM's bounds analysis fails on a Select of
    floats inside a product."""
    bits = _BITS.get(sc.COMPUTE[a.dtype])
    if bits is None:
        return T.Select(condition, a.expr, b.expr)
    chosen = T.Select(condition, T.reinterpret(bits, a.expr), T.reinterpret(bits, b.expr))
    return T.reinterpret(sc.COMPUTE[a.dtype], chosen)


@point("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def where(p: Point) -> Scalar:
    condition = sc.cast(p.get(p["condition"], p["condition"].dtype), "bool")
    return choose(condition.expr, p.get(p["self"], p.dtype), p.get(p["other"], p.dtype))


@point("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(p: Point) -> Scalar:
    mask = p.get(p["mask"], "bool")
    return choose(mask.expr, p.get(p["value"], p.dtype), p.get(p["self"], p.dtype))


# ---- logic and bits --------------------------------------------------------------------


def _logic(name: str, by: Callable[[Any, Any], Any]) -> None:
    @point(f"logical_{name}", exact=True)
    def logical(p: Point) -> Scalar:
        return Scalar("bool", by(p.get(p["self"], "bool").expr, p.get(p["other"], "bool").expr))


_logic("and", tirx.And)
_logic("or", tirx.Or)
_logic("xor", _differ)


def _bits(name: str, bools: Callable[[Any, Any], Any], ints: Callable[[Any, Any], Any]) -> None:
    @point(f"bitwise_{name}.Tensor", f"bitwise_{name}.Scalar", exact=True)
    def bitwise(p: Point) -> Scalar:
        a, b = operands(p)
        return result(p, Scalar(a.dtype, (bools if a.dtype == "bool" else ints)(a.expr, b.expr)))


_bits("and", tirx.And, tirx.bitwise_and)
_bits("or", tirx.Or, tirx.bitwise_or)
_bits("xor", _differ, tirx.bitwise_xor)


def _shift(name: str, by: Callable[[Any, Any], Any]) -> None:
    @point(
        f"bitwise_{name}_shift.Tensor",
        f"bitwise_{name}_shift.Tensor_Scalar",
        f"__{name[0]}shift__.Tensor",
        f"__{name[0]}shift__.Scalar",
        exact=True,
    )
    def shift(p: Point) -> Scalar:
        a, b = operands(p)
        return result(p, Scalar(a.dtype, by(a.expr, b.expr)))


_shift("left", tirx.shift_left)
_shift("right", tirx.shift_right)


@point("bitwise_not", exact=True)
def bitwise_not(p: Point) -> Scalar:
    x = p.get(p["self"])
    if x.dtype == "bool":
        return Scalar("bool", tirx.Not(x.expr))
    return Scalar(x.dtype, tirx.bitwise_not(x.expr))


@point("logical_not", exact=True)
def logical_not(p: Point) -> Scalar:
    return Scalar("bool", tirx.Not(p.get(p["self"], "bool").expr))


@point("polar", cost=2 * HEAVY)
def polar(p: Point) -> Scalar:
    size, angle = p.get(p["abs"], "f32"), p.get(p["angle"], "f32")
    return Scalar("c64", size.expr * T.cos(angle.expr), size.expr * T.sin(angle.expr))


@point("complex")
def complex_(p: Point) -> Scalar:
    return Scalar("c64", p.get(p["real"], "f32").expr, p.get(p["imag"], "f32").expr)
