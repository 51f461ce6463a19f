"""Functions of sizes that Python's math module and its integers have, on exact numbers.

    isqrt(T)           math.isqrt(n)
    bit_length(T)      n.bit_length()
    pow2(T)            1 << n
    sqrt log log2 log10 exp power      the double that math.sqrt(n), ..., n ** 0.5 return

Doubles come from Python's own functions, since a logarithm may round otherwise elsewhere. Kernels
take the results as sizes (`value_of_size`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

Number = int | Fraction

_GREATEST_POWER = 1 << 10
"""An untrusted exponent could take all memory."""


def _double(function: Callable[..., float]) -> Callable[..., Number]:
    """`function` on numbers that are doubles. Raises ZeroDivisionError where it has no value."""

    def of_doubles(*numbers: Number) -> Number:
        try:
            value = Fraction(function(*map(float, numbers)))
        except (ValueError, OverflowError, TypeError):  # a TypeError for a complex power
            raise ZeroDivisionError(f"no value at {numbers}") from None
        return value.numerator if value.denominator == 1 else value

    return of_doubles


def _of_integers(function: Callable[[int], int], low: int, high: int) -> Callable[[Number], int]:
    def of_integer(number: Number) -> int:
        if number.denominator != 1 or not low <= number < high:
            raise ZeroDivisionError(f"no value at {number}")
        return function(int(number))

    return of_integer


DOUBLES: Mapping[str, Callable[..., Number]] = {
    "sqrt": _double(math.sqrt),
    "log": _double(math.log),
    "log2": _double(math.log2),
    "log10": _double(math.log10),
    "exp": _double(math.exp),
    "power": _double(lambda base, exponent: base**exponent),
}
INTEGERS: Mapping[str, Callable[[Number], int]] = {
    "isqrt": _of_integers(math.isqrt, 0, 1 << 256),
    "bit_length": _of_integers(int.bit_length, -(1 << 256), 1 << 256),
    "pow2": _of_integers(lambda exponent: 1 << exponent, 0, _GREATEST_POWER),
}
