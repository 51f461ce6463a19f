"""Roots, logarithms and powers of sizes, as sympy functions without algebra of their own.

A result of `sqrt`, `log`, `log2`, `log10`, `exp` and `power` is a double, as Python's; one of
`isqrt`, `bit_length` and `pow2` is an integer. The values are those of
`moec.runtime.sizes.functions`.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import sympy

from moec.runtime.sizes.functions import DOUBLES, INTEGERS


def _value(name: str, numbers: tuple[sympy.Expr, ...]) -> sympy.Expr | None:
    if not all(x.is_Rational for x in numbers):
        return None
    function = DOUBLES.get(name) or INTEGERS[name]
    try:
        value = Fraction(function(*(Fraction(int(x.p), int(x.q)) for x in numbers)))
    except ZeroDivisionError:
        return sympy.nan
    return sympy.Rational(value.numerator, value.denominator)


class DoubleFunction(sympy.Function):  # type: ignore[misc]
    """A double that Python's math module computes of doubles."""

    nargs = 1

    @classmethod
    def eval(cls, *numbers: sympy.Expr) -> sympy.Expr | None:
        return _value(cls.__name__, numbers)

    def _eval_is_extended_real(self) -> bool | None:
        return True

    def _eval_is_finite(self) -> bool | None:
        return True


class sqrt(DoubleFunction):  # as the IR writes it
    def _eval_is_nonnegative(self) -> bool | None:
        return True


class _Logarithm(DoubleFunction):
    """Of an integer it is not negative: there is none of 0."""

    def _eval_is_nonnegative(self) -> bool | None:
        return True if self.args[0].is_integer else None


class log(_Logarithm): ...


class log2(_Logarithm): ...


class log10(_Logarithm): ...


class exp(DoubleFunction):
    def _eval_is_nonnegative(self) -> bool | None:
        return True


class power(DoubleFunction):
    nargs = 2

    def _eval_is_nonnegative(self) -> bool | None:
        return True if self.args[0].is_nonnegative else None


class IntegerFunction(sympy.Function):  # type: ignore[misc]
    """A whole number, not negative, of a whole number."""

    nargs = 1
    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, number: sympy.Expr) -> sympy.Expr | None:
        return _value(cls.__name__, (number,))


class isqrt(IntegerFunction): ...


class bit_length(IntegerFunction): ...


class pow2(IntegerFunction): ...


FUNCTIONS: dict[str, Any] = {
    f.__name__: f for f in (sqrt, log, log2, log10, exp, power, isqrt, bit_length, pow2)
}


def uses_functions(x: Any) -> bool:
    return isinstance(x, sympy.Basic) and x.has(DoubleFunction, IntegerFunction)
