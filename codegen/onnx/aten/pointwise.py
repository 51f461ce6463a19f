"""Arithmetic, comparisons and functions of single elements."""

from __future__ import annotations

import math
from functools import partial

from moec.codegen.loops.rules import common_dtype
from moec.codegen.onnx.rules import Call, build
from moec.dtypes import FLOATS
from moec.errors import NoMatch
from moec.ir.graph import Value

# ---- functions -------------------------------------------------------------------------

UNARY = {
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "neg": "Neg",
    "abs": "Abs",
    "floor": "Floor",
    "ceil": "Ceil",
    "round": "Round",
    "sin": "Sin",
    "cos": "Cos",
    "tan": "Tan",
    "asin": "Asin",
    "acos": "Acos",
    "atan": "Atan",
    "sinh": "Sinh",
    "cosh": "Cosh",
    "erf": "Erf",
    "reciprocal": "Reciprocal",
}


def _unary(kind: str, c: Call) -> str:
    return c.w(kind, c.read(c["self"], c.out.dtype))


for _name, _kind in UNARY.items():
    build(_name)(partial(_unary, _kind))


@build("alias", "clone", "detach", "contiguous", "lift_fresh_copy", "_to_copy")
def identity(c: Call) -> str:
    return c.read(c["self"], c.out.dtype)


@build("sign")
def sign(c: Call) -> str:
    """Of NaN it is 0; ONNX Runtime's Sign gives NaN."""
    x, zero = c.read(c["self"]), c.w.constant(0, c.out.dtype)
    above, below = (c.w.cast(c.w(k, x, zero), "bool", c.out.dtype) for k in ("Greater", "Less"))
    return c.w("Sub", above, below)


@build("rsqrt")
def rsqrt(c: Call) -> str:
    return c.w("Reciprocal", c.w("Sqrt", c.read(c["self"], c.out.dtype)))


@build("square")
def square(c: Call) -> str:
    x = c.read(c["self"])
    return c.w("Mul", x, x)


@build("silu")
def silu(c: Call) -> str:
    x = c.read(c["self"])
    return c.w("Mul", x, c.w("Sigmoid", x))


@build("gelu")
def gelu(c: Call) -> str:
    x, dtype = c.read(c["self"]), c.out.dtype
    if c.w.opset >= 20:
        return c.w("Gelu", x, approximate=c["approximate"])
    one, half = c.w.constant(1, dtype), c.w.constant(0.5, dtype)
    if c["approximate"] == "tanh":
        cube = c.w("Mul", c.w.constant(0.044715, dtype), c.w("Mul", x, c.w("Mul", x, x)))
        inner = c.w("Mul", c.w.constant(math.sqrt(2 / math.pi), dtype), c.w("Add", x, cube))
        share = c.w("Add", one, c.w("Tanh", inner))
    else:
        share = c.w("Add", one, c.w("Erf", c.w("Mul", x, c.w.constant(math.sqrt(0.5), dtype))))
    return c.w("Mul", c.w("Mul", half, x), share)


@build("log1p", "expm1", "log2", "log10")
def shifted(c: Call) -> str:
    x, one = c.read(c["self"], c.out.dtype), c.w.constant(1, c.out.dtype)
    match c.op.name:
        case "aten.log1p.default":
            return c.w("Log", c.w("Add", x, one))
        case "aten.expm1.default":
            return c.w("Sub", c.w("Exp", x), one)
    base = 2.0 if "log2" in c.op.name else 10.0
    return c.w("Mul", c.w("Log", x), c.w.constant(1 / math.log(base), c.out.dtype))


@build("trunc")
def trunc(c: Call) -> str:
    x = c.read(c["self"])
    positive = c.w("Less", c.w.constant(0, c.out.dtype), x)
    return c.w("Where", positive, c.w("Floor", x), c.w("Ceil", x))


@build("isnan", "isinf")
def special(c: Call) -> str:
    return c.w("IsNaN" if "nan" in c.op.name else "IsInf", c.read(c["self"]))


@build("logical_not", "bitwise_not")
def invert(c: Call) -> str:
    value = c["self"]
    if c.op.name == "aten.bitwise_not.default" and value.dtype != "bool":
        return c.w("BitwiseNot", c.read(value))
    return c.w("Not", c.read(value, "bool"))


@build("softplus")
def softplus(c: Call) -> str:
    if (c["beta"], c["threshold"]) != (1, 20):
        raise NoMatch("operator aten.softplus.default with another beta than 1 has no ONNX form")
    return c.w("Softplus", c.read(c["self"]))


@build("leaky_relu", "elu")
def elu(c: Call) -> str:
    if "leaky" in c.op.name:
        return c.w("LeakyRelu", c.read(c["self"]), alpha=float(c["negative_slope"]))
    if (c["scale"], c["input_scale"]) != (1, 1):
        raise NoMatch("operator aten.elu.default with a scale has no ONNX form")
    return c.w("Elu", c.read(c["self"]), alpha=float(c["alpha"]))


@build("hardswish", "hardsigmoid", "relu6", "hardtanh")
def hard(c: Call) -> str:
    x, dtype = c.read(c["self"]), c.out.dtype
    match c.op.name:
        case "aten.hardswish.default":
            return c.w("HardSwish", x)
        case "aten.hardsigmoid.default":
            return c.w("HardSigmoid", x, alpha=1 / 6, beta=0.5)
        case "aten.relu6.default":
            low, high = 0.0, 6.0
        case _:
            low, high = c["min_val"], c["max_val"]
    return c.w("Clip", x, c.w.constant(low, dtype), c.w.constant(high, dtype))


# ---- two operands ----------------------------------------------------------------------


def _binary(kind: str, c: Call) -> str:
    """Computed in the dtype that torch uses, then cast to that of the result."""
    dtype = common_dtype(c["self"], c["other"])
    if dtype == "bool" and kind in ("Less", "Greater", "LessOrEqual", "GreaterOrEqual", "Mul"):
        dtype = "i32"
    result = c.w(kind, c.operand("self", dtype), c.operand("other", dtype))
    result_dtype = "bool" if kind in COMPARISONS else dtype
    return c.w.cast(result, result_dtype, c.out.dtype)


COMPARISONS = {
    "Equal": "eq",
    "Less": "lt",
    "LessOrEqual": "le",
    "Greater": "gt",
    "GreaterOrEqual": "ge",
}
for _kind, _name in COMPARISONS.items():
    build(f"{_name}.Tensor", f"{_name}.Scalar")(partial(_binary, _kind))
build("mul.Tensor", "mul.Scalar")(partial(_binary, "Mul"))
build("maximum")(partial(_binary, "Max"))
build("minimum")(partial(_binary, "Min"))


@build("ne.Tensor", "ne.Scalar")
def ne(c: Call) -> str:
    dtype = common_dtype(c["self"], c["other"])
    return c.w("Not", c.w("Equal", c.operand("self", dtype), c.operand("other", dtype)))


def _scaled(c: Call, name: str, dtype: str) -> str:
    """An operand times alpha."""
    x = c.operand(name, dtype)
    return x if c["alpha"] == 1 else c.w("Mul", x, c.w.constant(c["alpha"], dtype))


@build("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar")
def add(c: Call) -> str:
    kind = "Add" if ".add." in c.op.name else "Sub"
    dtype = c.out.dtype
    if dtype == "bool":
        return c.w("Or", c.operand("self", dtype), c.operand("other", dtype))
    return c.w(kind, c.operand("self", dtype), _scaled(c, "other", dtype))


@build("rsub.Tensor", "rsub.Scalar")
def rsub(c: Call) -> str:
    return c.w("Sub", c.operand("other", c.out.dtype), _scaled(c, "self", c.out.dtype))


@build("div.Tensor", "div.Scalar")
def div(c: Call) -> str:
    return c.w("Div", c.operand("self", c.out.dtype), c.operand("other", c.out.dtype))


@build("div.Tensor_mode", "div.Scalar_mode", "floor_divide", "floor_divide.Scalar")
def rounded(c: Call) -> str:
    """ONNX divides integers towards zero; torch also rounds towards minus infinity, and there takes
    the floor of the exact quotient of floats: 1 // 0.1 is 9."""
    dtype = c.out.dtype
    a, b = c.operand("self", dtype), c.operand("other", dtype)
    down = "floor_divide" in c.op.name or c["rounding_mode"] == "floor"
    if down and dtype in FLOATS:
        return _floor(c, a, b)
    quotient = c.w("Div", a, b)
    if dtype in FLOATS:
        positive = c.w("Less", c.w.constant(0, dtype), quotient)
        return c.w("Where", positive, c.w("Floor", quotient), c.w("Ceil", quotient))
    if not down:
        return quotient
    return c.w("Div", c.w("Sub", a, c.w("Mod", a, b)), b)


@build("remainder.Tensor", "remainder.Scalar")
def remainder(c: Call) -> str:
    """With the divisor's sign: Mod for integers; for floats it has that of the dividend."""
    dtype = c.out.dtype
    a, b = c.operand("self", dtype), c.operand("other", dtype)
    if dtype not in FLOATS:
        return c.w("Mod", a, b)
    left, opposed = _exact_remainder(c, a, b)
    return c.w("Where", opposed, c.w("Add", left, b), left)


def _exact_remainder(c: Call, a: str, b: str) -> tuple[str, str]:
    """(the exact remainder of floats, with a's sign; whether that is not 0 and not of b's sign)."""
    zero = c.w.constant(0, c.out.dtype)
    left = c.w("Mod", a, b, fmod=1)
    signs = c.w("Xor", c.w("Less", b, zero), c.w("Less", left, zero))
    return left, c.w("And", signs, c.w("Not", c.w("Equal", left, zero)))


def _floor(c: Call, a: str, b: str) -> str:
    """The floats' exact quotient rounded down, and a / b for a divisor of 0."""
    dtype = c.out.dtype
    left, opposed = _exact_remainder(c, a, b)
    multiple = c.w("Round", c.w("Div", c.w("Sub", a, left), b))
    quotient = c.w("Sub", multiple, c.w.cast(opposed, "bool", dtype))
    by_zero = c.w("Equal", b, c.w.constant(0, dtype))
    return c.w("Where", by_zero, c.w("Div", a, b), quotient)


@build("fmod.Tensor", "fmod.Scalar")
def fmod(c: Call) -> str:
    dtype = c.out.dtype
    return c.w("Mod", c.operand("self", dtype), c.operand("other", dtype), fmod=1)


@build("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
def power(c: Call) -> str:
    dtype = c.out.dtype
    if c["exponent"] == 2 and isinstance(c["exponent"], int | float):
        x = c.operand("self", dtype)
        return c.w("Mul", x, x)
    return c.w("Pow", c.operand("self", dtype), c.operand("exponent", dtype))


LOGICAL = {"and": "And", "or": "Or", "xor": "Xor"}


def _logical(kind: str, c: Call) -> str:
    return c.w(kind, c.operand("self", "bool"), c.operand("other", "bool"))


def _bitwise(kind: str, c: Call) -> str:
    dtype = c.out.dtype
    kind = kind if dtype == "bool" else f"Bitwise{kind}"
    return c.w(kind, c.operand("self", dtype), c.operand("other", dtype))


for _name, _kind in LOGICAL.items():
    build(f"logical_{_name}")(partial(_logical, _kind))
    build(f"bitwise_{_name}.Tensor", f"bitwise_{_name}.Scalar")(partial(_bitwise, _kind))


# ---- choosing --------------------------------------------------------------------------


@build("where.self", "where.Scalar", "where.ScalarSelf", "where.ScalarOther")
def where(c: Call) -> str:
    dtype = c.out.dtype
    return c.w(
        "Where",
        c.read(c["condition"], "bool"),
        c.operand("self", dtype),
        c.operand("other", dtype),
    )


@build("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(c: Call) -> str:
    dtype = c.out.dtype
    return c.w("Where", c.read(c["mask"]), c.operand("value", dtype), c.read(c["self"]))


def _limit(kind: str, name: str, x: str, c: Call) -> str:
    return x if c[name] is None else c.w(kind, x, c.operand(name, c.out.dtype))


@build("clamp", "clamp.Tensor")
def clamp(c: Call) -> str:
    x = _limit("Max", "min", c.read(c["self"], c.out.dtype), c)
    return _limit("Min", "max", x, c)


@build("clamp_min", "clamp_min.Tensor")
def clamp_min(c: Call) -> str:
    return _limit("Max", "min", c.read(c["self"], c.out.dtype), c)


@build("clamp_max", "clamp_max.Tensor")
def clamp_max(c: Call) -> str:
    return _limit("Min", "max", c.read(c["self"], c.out.dtype), c)


@build("copy")
def copy(c: Call) -> str:
    source: Value = c["src"]
    return c.expanded(c.read(source, c.out.dtype), source.shape, c.out.shape)
