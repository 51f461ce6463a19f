"""Expressions of sizes, and conditions on them, as functions in exact arithmetic.

Integers stay Python's integers, which are ten times as fast as rationals; a Fraction arises only
where an expression divides. Sympy's own substitution takes a hundred times as long.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache
from typing import Any

import sympy

from moec.errors import IRError
from moec.ir.sizes.floats import nearest
from moec.ir.sizes.functions import DoubleFunction, IntegerFunction
from moec.runtime.sizes.functions import DOUBLES, INTEGERS

Function = Callable[[Mapping[str, int]], Any]


def _simplest(number: int | Fraction) -> int | Fraction:
    """The number, as an int where it is one."""
    return number.numerator if number.denominator == 1 else number


def _sum(*terms: int | Fraction) -> int | Fraction:
    return _simplest(sum(terms))


def _product(*factors: int | Fraction) -> int | Fraction:
    return _simplest(math.prod(factors))


def _double(number: int | Fraction) -> int | Fraction:
    return _simplest(nearest(Fraction(number)))


def _power(base: int | Fraction, exponent: int | Fraction) -> int | Fraction:
    """A power with an integer exponent: a double would not be exact."""
    return base ** int(exponent) if exponent >= 0 else _simplest(Fraction(base) ** int(exponent))


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "Add": _sum,
    "Mul": _product,
    "Pow": _power,
    "FloatPow": DOUBLES["power"],
    "rint": round,
    "f64": _double,
    "Mod": lambda a, b: _simplest(a % b),
    "Abs": abs,
    "Max": lambda *xs: max(xs),
    "Min": lambda *xs: min(xs),
    "Equality": operator.eq,
    "Unequality": operator.ne,
    "StrictGreaterThan": operator.gt,
    "GreaterThan": operator.ge,
    "StrictLessThan": operator.lt,
    "LessThan": operator.le,
    "And": lambda *xs: all(xs),
    "Or": lambda *xs: any(xs),
    "Not": operator.not_,
}


@cache
def function_of(expression: sympy.Basic) -> Function:
    """The expression as a function of named sizes: an int, a Fraction, or the truth of a condition.

    A whole number is an int. The function raises KeyError for a size that is not given, and
    ZeroDivisionError as the expression does. Raises IRError for an expression that is made with
    other functions than sizes are.
    """
    if isinstance(expression, sympy.Symbol):
        return operator.itemgetter(expression.name)
    if isinstance(expression, sympy.Rational):
        number = _simplest(Fraction(int(expression.p), int(expression.q)))
        return lambda sizes: number
    if expression in (sympy.true, sympy.false):
        answer = expression == sympy.true
        return lambda sizes: answer
    if isinstance(expression, sympy.floor | sympy.ceiling):
        return _rounded(expression)
    is_function = isinstance(expression, DoubleFunction | IntegerFunction)
    function = ({**DOUBLES, **INTEGERS} if is_function else _FUNCTIONS).get(
        type(expression).__name__
    )
    if function is None or (expression.is_Pow and not expression.exp.is_integer):
        raise IRError(f"{expression} is made with {type(expression).__name__}")
    parts = [function_of(part) for part in expression.args]
    if len(parts) == 1:
        (inner,) = parts
        return lambda sizes: function(inner(sizes))
    if len(parts) == 2:  # most have two, which to list takes as long as to compute
        first, second = parts
        return lambda sizes: function(first(sizes), second(sizes))
    return lambda sizes: function(*[part(sizes) for part in parts])


def _rounded(expression: sympy.floor | sympy.ceiling) -> Function:
    """floor(B*S/4) as a quotient of integers, without a rational number."""
    (argument,) = expression.args
    terms = [term.as_coeff_Mul() for term in sympy.Add.make_args(argument)]
    below = math.lcm(*(int(number.q) for number, _ in terms if number.is_Rational))
    above = function_of(sympy.Add(*(number * below * rest for number, rest in terms)))
    if isinstance(expression, sympy.floor):
        return lambda sizes: above(sizes) // below
    return lambda sizes: -(-above(sizes) // below)
