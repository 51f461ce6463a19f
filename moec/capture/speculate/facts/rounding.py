"""floor, ceil and trunc of a float computed from a size, as an integer division.

`int(tokens * 1.25 / 6)` equals `tokens * 5 // 24` only where the rounding of the floats never
changes the result. Both are computed for every size below `LIMIT`; where they differ, the float is
kept.
"""

from __future__ import annotations

import fractions
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import sympy
import torch

from moec.capture.speculate.facts.symbols import expression
from moec.torch_private import free_unbacked_symbols

LIMIT = 1 << 20
"""Sizes (tokens of one call) below which the floats are compared with the integers."""

Rounding = Literal["floor", "ceil", "trunc"]
ROUNDINGS: tuple[Rounding, ...] = ("floor", "ceil", "trunc")
_ROUND: dict[str, Callable[[Any], Any]] = {"floor": np.floor, "ceil": np.ceil, "trunc": np.trunc}
_PRECISION = {"float64": 10**6, "float32": 10**3}
"""The greatest denominator of a ratio that a float of this type represents."""
_FLOATS = {
    "ToFloat": np.float64,
    "FloatTrueDiv": np.true_divide,
    "IntTrueDiv": np.true_divide,
    "FloatPow": np.power,
    "FloorDiv": np.floor_divide,
    "CleanDiv": np.floor_divide,
    "Mod": np.mod,
    "PythonMod": np.mod,
    "FloorToInt": np.floor,
    "CeilToInt": np.ceil,
    "TruncToInt": np.trunc,
    "RoundToInt": np.round,
    "Greatest": np.maximum,
    "Least": np.minimum,
}
_EXTREMES = {"Max": sympy.Function("Greatest"), "Min": sympy.Function("Least")}
"""numpy has functions of two arrays for these, and sympy prints others of a list of arrays."""


def divided(value: torch.SymFloat, how: Rounding, sizes: dict[sympy.Expr, Any]) -> Any:
    """`value` rounded, as an integer division of one of `sizes` (which include products).

    None where the float is no multiple of such a size, such as a root or a logarithm of it, or
    rounds differently from the integers.
    """
    expr = expression(value)
    if not expr.free_symbols or free_unbacked_symbols(value) or not _has_arrays(expr):
        return None
    tokens = sympy.Symbol("tokens", integer=True, positive=True)
    for size, number in sizes.items():
        alone = expr.xreplace({size: tokens})
        if alone.free_symbols == {tokens}:
            return as_division(function_of(alone, tokens), number, how)
    return None


def _has_arrays(expr: sympy.Expr) -> bool:
    """Whether arrays of numbers have all functions of an expression."""
    names = {type(part).__name__ for part in expr.atoms(sympy.Function)}
    return names <= _FLOATS.keys() | _EXTREMES.keys() | {"floor", "ceiling"}


Function = Callable[[Any], Any]


def function_of(expr: Any, tokens: sympy.Symbol) -> Function:
    """An expression as a function of an array of numbers of tokens, in doubles."""
    expr = expr.replace(
        lambda part: type(part).__name__ in _EXTREMES,
        lambda part: functools.reduce(_EXTREMES[type(part).__name__], part.args),
    )
    value = sympy.lambdify([tokens], expr, [_FLOATS, "numpy"])
    return lambda counts: value(counts) * np.ones_like(counts)


def as_division(value: Function, number: Any, how: Rounding) -> Any:
    """`value(number)` rounded, as an integer division of the size `number`; None where it rounds
    differently for a number of tokens below `LIMIT`."""
    up, down = _ratio(value, how) or (0, 0)
    if down and how == "ceil":
        return -((-number * up) // down)
    return (number * up) // down if down else None


def _ratio(value: Function, how: Rounding) -> tuple[int, int] | None:
    """(numerator, denominator) whose multiples round as the float does for every number of tokens
    below `LIMIT`; None where there is no such ratio."""
    floats = value(np.arange(1, LIMIT, dtype=np.float64))
    if not math.isfinite(floats[0]) or floats[0] < 0:
        return None
    ratio = fractions.Fraction(float(floats[0])).limit_denominator(_PRECISION[floats.dtype.name])
    up, down = ratio.numerator, ratio.denominator
    integers = np.arange(1, LIMIT, dtype=np.int64)
    exact = -((-integers * up) // down) if how == "ceil" else (integers * up) // down
    return (up, down) if bool((_ROUND[how](floats) == exact).all()) else None
