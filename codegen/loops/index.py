"""Positions inside tensors: int64 expressions with a key for equality, and a range.

Equal keys mean equal positions, so an element that several ops read is computed once. `low` and
`high` determine, if they suffice, which piece of a concatenation a position is in.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import sympy
from tvm import tirx
from tvm.ir import Expr, Var
from tvm.script.ir_builder import tirx as T

from moec.errors import UnsupportedError
from moec.ir.sizes.dims import Dim, symbols
from moec.ir.sizes.floats import f64, is_float, operation


@dataclass(frozen=True)
class Index:
    """A position between low and high, both inclusive. Not negative unless low is."""

    expr: Expr
    key: Hashable
    low: int | None = 0
    high: int | None = None

    @property
    def constant(self) -> int | None:
        return self.low if self.low is not None and self.low == self.high else None


Position: TypeAlias = tuple[Index, ...]


def const(value: int) -> Index:
    return Index(tirx.const(value, "int64"), value, value, value)


def loop(var: Expr, name: str, stop: Dim, start: int = 0) -> Index:
    return Index(var, name, start, stop - 1 if isinstance(stop, int) else None)


def add(a: Index, b: Index) -> Index:
    if a.constant == 0:
        return b
    if b.constant == 0:
        return a
    if a.constant is not None and b.constant is not None:
        return const(a.constant + b.constant)
    return Index(a.expr + b.expr, ("+", a.key, b.key), _plus(a.low, b.low), _plus(a.high, b.high))


def sub(a: Index, b: Index) -> Index:
    if b.constant == 0:
        return a
    if a.constant is not None and b.constant is not None:
        return const(a.constant - b.constant)
    low = _plus(a.low, None if b.high is None else -b.high)
    high = _plus(a.high, None if b.low is None else -b.low)
    return Index(a.expr - b.expr, ("-", a.key, b.key), low, high)


def mul(a: Index, b: Index) -> Index:
    """The product of two nonnegative positions."""
    if a.constant == 1:
        return b
    if b.constant == 1:
        return a
    if a.constant is not None and b.constant is not None:
        return const(a.constant * b.constant)
    high = a.high * b.high if a.high is not None and b.high is not None else None
    low = (a.low or 0) * (b.low or 0)
    return Index(a.expr * b.expr, ("*", a.key, b.key), low, high)


def div(a: Index, b: Index) -> Index:
    """a // b for a >= 0; 0 where b is 0, in loops that never run."""
    if b.constant in (0, 1):
        return a if b.constant else b
    if a.constant is not None and b.constant is not None:
        return const(a.constant // b.constant)
    high = a.high // b.constant if a.high is not None and b.constant else a.high
    return Index(quotient(a.expr, b.expr), ("/", a.key, b.key), 0, high)


def mod(a: Index, b: Index) -> Index:
    """a % b for a >= 0; 0 where b is 0, in loops that never run."""
    if b.constant == 0:
        return b
    if a.constant is not None and b.constant is not None:
        return const(a.constant % b.constant)
    if a.high is not None and b.low is not None and a.high < b.low:
        return a
    high = None if b.high is None else b.high - 1
    return Index(remainder(a.expr, b.expr), ("%", a.key, b.key), 0, high)


def wide(x: Expr) -> Expr:
    """x as an argument of an int64 function. TVM narrows arguments that it knows to be small;
    adding an opaque number (which is 0) prevents that."""
    return x + T.call_extern("int64", "moec_zero_i64")


def quotient(a: Expr, b: Expr) -> Expr:
    """a // b for a >= 0.

    If b is 0, or a size that may be 0, the division is never executed. But TVM would conclude from
    it that b is not 0, and might hoist it. A call of an LLVM function hides the division from TVM.
    """
    if isinstance(b, tirx.IntImm):
        return tirx.truncdiv(a, b) if b.value else b
    return T.call_extern("int64", "moec_quotient_i64", wide(a), wide(b))


def remainder(a: Expr, b: Expr) -> Expr:
    """a % b for a >= 0, hidden from TVM like `quotient`."""
    if isinstance(b, tirx.IntImm):
        return tirx.truncmod(a, b) if b.value else b
    return T.call_extern("int64", "moec_rest_i64", wide(a), wide(b))


def bounded(a: Index, size: Index) -> Index:
    """The nearest position inside an axis of that size."""
    low, high, least = a.low, a.high, size.low
    if low is not None and high is not None and least is not None and 0 <= low <= high < least:
        return a
    zero = tirx.const(0, "int64")
    expr = tirx.max(tirx.min(a.expr, size.expr - 1), zero)
    return Index(expr, ("bounded", a.key, size.key), 0, _plus(size.high, -1))


def _plus(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


class Sizes:
    """Converts sizes of the IR to int64 expressions over one function's variables."""

    def __init__(self, variables: Mapping[str, Var], inside_kernel: bool = False) -> None:
        self.variables = variables
        self.inside_kernel = inside_kernel
        self.exprs: dict[Dim, Expr] = {}

    def expr(self, dim: Dim) -> Expr:
        if isinstance(dim, int):
            return tirx.const(dim, "int64")
        if dim not in self.exprs:
            self.exprs[dim] = self._expr(sympy.sympify(dim))
        return self.exprs[dim]

    def _divisor(self, dim: sympy.Expr) -> Expr:
        """A size as a divisor, with 1 in place of 0; TVM must not see that (see `quotient`)."""
        expr = self._expr(dim)
        if not self.inside_kernel or isinstance(expr, tirx.IntImm):
            return expr
        return T.call_extern("int64", "moec_divisor_i64", wide(expr))

    def index(self, dim: Dim) -> Index:
        if isinstance(dim, int):
            return const(dim)
        return Index(self.expr(dim), ("size", str(dim)))

    def _expr(self, dim: sympy.Expr) -> Expr:
        numerator, denominator = sympy.fraction(sympy.together(dim))
        if denominator != 1:
            return tirx.floordiv(self._expr(numerator), self._divisor(denominator))
        if dim.is_Integer:
            return tirx.const(int(dim), "int64")
        if isinstance(dim, sympy.Symbol):
            return self.variables[dim.name]
        if is_float(dim) and type(dim).__name__ in ("floor", "ceiling", "rint"):
            return self._rounded(type(dim).__name__, dim.args[0])
        arguments = [self._expr(a) for a in dim.args]
        # By name: torch has its own classes for some of them.
        match type(dim).__name__:
            case "Add":
                return _fold(lambda a, b: a + b, arguments)
            case "Mul":
                return _fold(lambda a, b: a * b, arguments)
            case "Pow":
                return _fold(lambda a, b: a * b, [arguments[0]] * int(dim.args[1]))
            case "floor":
                return arguments[0]
            case "ceiling":
                top, bottom = sympy.fraction(sympy.together(dim.args[0]))
                below = self._divisor(bottom)
                if isinstance(below, tirx.IntImm):
                    return tirx.floordiv(self._expr(top) + below - 1, below)
                return 0 - tirx.floordiv(0 - self._expr(top), below)  # below may be negative
            case "Mod":
                return tirx.floormod(arguments[0], self._divisor(dim.args[1]))
            case "Max":
                return _fold(tirx.max, arguments)
            case "Min":
                return _fold(tirx.min, arguments)
            case "Abs":
                return T.Select(arguments[0] < 0, 0 - arguments[0], arguments[0])
        raise UnsupportedError(f"the size {dim} cannot be computed: it uses {dim.func.__name__}")

    def _rounded(self, kind: str, x: sympy.Expr) -> Expr:
        """A float64 rounded to an integer."""
        rounding = {"floor": tirx.floor, "ceiling": tirx.ceil, "rint": tirx.nearbyint}
        return tirx.Cast("int64", rounding[kind](self._double(x)))

    def _double(self, x: sympy.Expr) -> Expr:
        """An operand of `floats.operation`: the f64, or an exact integer."""
        if x.is_Rational:
            return tirx.const(float(x), "float64")
        sign, factor = x.as_coeff_Mul()
        if isinstance(factor, f64):
            operator, left, right = operation(factor.args[0])
            a, b = self._double(left), self._double(right)
            operand = a + b if operator == "add" else a * b if operator == "mul" else a / b
            return operand if sign == 1 else operand * tirx.const(float(sign), "float64")
        top, bottom = sympy.fraction(sympy.together(x))
        operand = tirx.Cast("float64", self._expr(top))
        return operand / tirx.const(float(bottom), "float64") if bottom != 1 else operand


def _fold(combine: object, values: list[Expr]) -> Expr:
    result = values[0]
    for value in values[1:]:
        result = combine(result, value)  # type: ignore[operator]
    return result


def names(*dims: Dim) -> set[str]:
    return {name for dim in dims for name in symbols(dim)}
