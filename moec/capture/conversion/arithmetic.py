"""Exact expressions for sizes that a module computes with Python floats.

    n * 0.3 * 0.7        torch's expression: 0.21*ToFloat(s0)
                         nodes of the graph: sym_float, mul by 0.3, mul by 0.7

Python rounds after each operation, in the order of the nodes. torch's own expression loses that
order, because sympy merges constants; so the expression is built from the nodes instead.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import sympy
import torch

from moec.ir.sizes.floats import ceil, f64, floor, round_half_even, trunc
from moec.ir.sizes.functions import power, sqrt

_FLOAT: Mapping[Any, Callable[..., sympy.Expr]] = {
    torch.sym_float: f64,
    operator.add: lambda a, b: f64(a + b),
    operator.sub: lambda a, b: f64(a - b),
    operator.mul: lambda a, b: f64(a * b),
    operator.truediv: lambda a, b: f64(a / b),
    operator.neg: lambda a: -a,
    operator.pos: lambda a: a,
    torch.sym_max: sympy.Max,
    torch.sym_min: sympy.Min,
    torch.sym_sqrt: sqrt,
    operator.pow: power,
}
"""Operations whose result is a float; the operands are integers or floats."""

_WHOLE: Mapping[Any, Callable[..., sympy.Expr]] = {
    torch.sym_int: trunc,
    math.trunc: trunc,
    math.floor: floor,
    math.ceil: ceil,
    builtins.round: lambda a, digits=None: round_half_even(a),
}
"""Operations that convert a float to an integer."""


def number(value: float) -> sympy.Expr:
    """A finite Python number as an exact sympy number. Raises ValueError for infinities and NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no size")
    fraction = Fraction(value)
    return sympy.Rational(fraction.numerator, fraction.denominator)


def float_of(target: Any, arguments: list[Any]) -> sympy.Expr | None:
    """The float that a node computes of sizes and floats; None for an unsupported operation."""
    return _apply(_FLOAT, target, arguments)


def whole_of(target: Any, arguments: list[Any]) -> sympy.Expr | None:
    """The integer that a node computes of a float; None for an unsupported operation."""
    if target is builtins.round and arguments[1:] not in ([], [None]):
        return None
    return _apply(_WHOLE, target, arguments[:1])


def _apply(
    table: Mapping[Any, Callable[..., sympy.Expr]], target: Any, arguments: list[Any]
) -> sympy.Expr | None:
    function = table.get(target)
    if function is None:
        return None
    operands = [number(a) if isinstance(a, int | float) else a for a in arguments]
    if not all(isinstance(a, sympy.Expr) for a in operands):
        return None
    return function(*operands)
