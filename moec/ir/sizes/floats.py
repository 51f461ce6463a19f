"""Sizes that Python computes in floats (int(1.1 * T)), with exactly the rounding of IEEE doubles.

f64(x) is the double nearest to the real number x, ties to even. IEEE 754 defines each operation on
doubles as f64 of the exact result, so

    math.ceil(T / 8 * 1.1)   is   ceiling(f64(2476979795053773/2251799813685248 * f64(T/8)))

in exact rational arithmetic. Sympy may rewrite the argument of an f64: it stays the same real
number, and so the same double. An f64 that cannot change its argument is dropped (T/8 has few
bits), which leaves an integer expression wherever one is provably equal.

Products of sizes are assumed to be below 2^40: no tensor has so many rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal

import sympy

from moec.ir.sizes.functions import DoubleFunction, bit_length, isqrt, log2, power, sqrt

_SHORT = 2**10
"""Numerators and denominators up to here, times a product of sizes, are far below 2^53."""
_MOST = 2**12
_WIDE = 2**31

Operator = Literal["add", "mul", "div"]


def nearest(value: Fraction) -> Fraction:
    """The double nearest to a rational number. Division of ints is rounded correctly."""
    return Fraction(value.numerator / value.denominator)


class f64(sympy.Function):  # type: ignore[misc]  # as the IR writes it
    """The double nearest to a real number."""

    nargs = 1

    @classmethod
    def eval(cls, x: sympy.Expr) -> sympy.Expr | None:
        if x.is_Rational:
            value = nearest(Fraction(int(x.p), int(x.q)))
            return sympy.Rational(value.numerator, value.denominator)
        return x if isinstance(x, cls | DoubleFunction) or _is_exact(x) else None

    def _eval_is_extended_real(self) -> bool | None:
        return True

    def _eval_is_finite(self) -> bool | None:
        return True

    def _eval_is_nonnegative(self) -> bool | None:
        return self.args[0].is_nonnegative  # type: ignore[no-any-return]


def _terms(x: sympy.Expr) -> list[tuple[sympy.Rational, sympy.Expr]] | None:
    """x as a short sum of rationals times integers, or None if it is not one."""
    terms = [term.as_coeff_Mul() for term in sympy.Add.make_args(x)]
    exact = all(c.is_Rational and rest.is_integer for c, rest in terms)
    return terms if exact and len(terms) <= 4 else None


def _is_exact(x: sympy.Expr) -> bool:
    """Whether x is certainly a double: it has few bits before and after the binary point."""
    terms = _terms(x)
    return terms is not None and all(
        abs(c.p) <= _SHORT and c.q <= _SHORT and c.q & (c.q - 1) == 0 for c, _ in terms
    )


def _without_rounding(x: sympy.Expr) -> sympy.Expr:
    """x without an f64 that does not change its floor, ceiling or rint.

    A fraction m/q with m < 2^52 is nearer to its double than to any integer or half-integer that it
    does not equal, so x and its double are on the same side of all of them.
    """
    if isinstance(x, f64):
        terms = _terms(x.args[0])
        if terms is not None:
            down = math.lcm(*(int(c.q) for c, _ in terms))
            if down <= _SHORT and all(abs(c.p) * down // c.q <= _SHORT for c, _ in terms):
                return x.args[0]
    return x


def floor(x: sympy.Expr) -> sympy.Expr:
    """The greatest integer that is not above x; that of a root or a logarithm to the base 2 needs
    no doubles: these are further from an integer that they do not equal than they are rounded."""
    size = _size_under(x)
    if size is not None:
        return _exponent(size) if isinstance(x, log2) else isqrt(size)
    return sympy.floor(_without_rounding(x))


def ceil(x: sympy.Expr) -> sympy.Expr:
    size = _size_under(x)
    if size is not None and isinstance(x, log2):
        return bit_length(size - 1)
    if size is not None:
        return isqrt(sympy.Max(size - 1, 0)) + sympy.Min(size, 1)
    return sympy.ceiling(_without_rounding(x))


def _exponent(size: sympy.Expr) -> sympy.Expr:
    half = (size - 1) / 2
    return bit_length(half) if half.is_integer else bit_length(size) - 1


def _size_under(x: sympy.Expr) -> sympy.Expr | None:
    """The integer whose root, or logarithm to the base 2, x is."""
    root = isinstance(x, power) and x.args[1] == sympy.Rational(1, 2)
    if root or isinstance(x, sqrt | log2):
        return x.args[0] if x.args[0].is_integer else None
    return None


def trunc(x: sympy.Expr) -> sympy.Expr:
    """Towards zero, as int() does."""
    if x.is_nonnegative:
        return floor(x)
    return sympy.Max(floor(x), 0) + sympy.Min(ceil(x), 0)


class rint(sympy.Function):  # type: ignore[misc]
    """The nearest integer, ties to even: Python's round()."""

    nargs = 1
    is_integer = True

    @classmethod
    def eval(cls, x: sympy.Expr) -> sympy.Expr | None:
        if x.is_Rational:
            return sympy.Integer(round(Fraction(int(x.p), int(x.q))))
        return x if x.is_integer else None

    def _eval_is_nonnegative(self) -> bool | None:
        return self.args[0].is_nonnegative  # type: ignore[no-any-return]


def round_half_even(x: sympy.Expr) -> sympy.Expr:
    return rint(_without_rounding(x))


def is_float(x: Any) -> bool:
    """Whether a size needs arithmetic on doubles."""
    return isinstance(x, sympy.Expr) and x.has(f64, rint, DoubleFunction)


def has_wide_numbers(x: Any) -> bool:
    """Whether integer arithmetic on a size outside of doubles may take more than 64 bits: one that
    floor(T / 0.1) has, of the double 0.1."""
    if not isinstance(x, sympy.Basic) or isinstance(x, f64 | DoubleFunction):
        return False
    if x.is_Rational:
        return bool(max(abs(x.p), x.q) > _WIDE)
    return any(map(has_wide_numbers, x.args))


def operation(x: sympy.Expr) -> tuple[Operator, sympy.Expr, sympy.Expr]:
    """The single IEEE operation that computes f64(x): its name and its two operands. Each operand
    is a double, an f64 or its negative, or a rational times an integer expression that is exact in
    a double.

    Raises ValueError where x is no such operation.
    """
    if isinstance(x, sympy.Add):
        return ("add", *_summands(x))
    c, rest = x.as_coeff_Mul()
    above, below = (sympy.Mul.make_args(part) for part in sympy.fraction(rest))
    for many, factor, divisor in _scales(c):
        top = _operands((*above, many), factor)
        bottom = _operands(below, divisor)
        if len(top) == 2 and not bottom:
            return "mul", top[0], top[1]
        if len(top) < 2 and len(bottom) == 1:
            return "div", top[0] if top else sympy.Integer(1), bottom[0]
    raise ValueError(f"{x} is more than one operation on doubles")


def _operands(factors: Sequence[sympy.Expr], number: sympy.Rational) -> list[sympy.Expr]:
    """The operands of a product. Integer factors are one operand, as their product is exact."""
    integer = sympy.Mul(*(f for f in factors if f.is_integer))
    doubles: list[sympy.Expr] = []
    for f in factors:
        if not f.is_integer:
            base, power = f.as_base_exp()
            doubles += [base] * int(power) if power.is_Integer else [f]
    return [f for f in (*doubles, integer, number) if f != 1]


def _scales(
    c: sympy.Rational,
) -> Iterator[tuple[sympy.Integer, sympy.Rational, sympy.Rational]]:
    """Ways to write c as a small integer times a quotient of two doubles, one of which is 1."""
    one = sympy.Integer(1)
    if c.is_Integer:
        yield c, one, one
    if _fits(c):
        yield one, c, one
    if _fits(1 / c):
        yield one, one, 1 / c
    if c.q & (c.q - 1) == 0:
        yield from ((sympy.Integer(m), c / m, one) for m in range(2, _MOST) if _fits(c / m))
    odd = int(c.p) // (int(c.p) & -int(c.p))
    if abs(odd) <= _MOST and _fits(odd / c):
        yield sympy.Integer(odd), one, odd / c


def _summands(x: sympy.Add) -> tuple[sympy.Expr, sympy.Expr]:
    """The two operands of an addition. Sympy merges integers and constants, so their order is lost;
    it does not matter as long as their sums are exact."""
    constant, rest = x.as_coeff_Add()
    terms = sympy.Add.make_args(rest)
    exact = sympy.Add(*(t for t in terms if _is_exact(t)))
    if not _fits(constant):
        exact, constant = exact + sympy.floor(constant), constant - sympy.floor(constant)
    elif _is_exact(constant):
        exact, constant = exact + constant, sympy.Integer(0)
    operands = [t for t in (*(t for t in terms if not _is_exact(t)), exact, constant) if t != 0]
    if len(operands) != 2 or not all(map(_is_operand, operands)):
        raise ValueError(f"{x} is more than one operation on doubles")
    return operands[0], operands[1]


def _is_operand(x: sympy.Expr) -> bool:
    c, rest = x.as_coeff_Mul()
    double = c in (1, -1) and isinstance(rest, f64 | DoubleFunction)
    return double or _is_exact(x) or bool(x.is_Rational and _fits(x))


def _fits(c: sympy.Rational) -> bool:
    value = Fraction(int(c.p), int(c.q))
    return abs(value) < 2**1000 and nearest(value) == value


def check(x: Any) -> None:
    """Raises ValueError where a part of x cannot be computed in doubles."""
    for part in x.atoms(f64) if isinstance(x, sympy.Expr) else ():
        operator, *operands = operation(part.args[0])
        for operand in operands:
            if operator != "add" and not _is_operand(operand):
                raise ValueError(f"{operand} is no operand of an operation on doubles")
