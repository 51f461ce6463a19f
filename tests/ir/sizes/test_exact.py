"""Sizes as functions: sympy's own substitution is the oracle."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import sympy

from moec.errors import IRError
from moec.ir.sizes.dims import evaluate_dim, parse_dim, show_dim, symbol
from moec.ir.sizes.exact import function_of
from moec.ir.sizes.floats import ceil, floor
from moec.ir.sizes.functions import log2, power, sqrt
from moec.runtime.sizes.expressions import evaluate

B, S = symbol("B"), symbol("S")

SIZES = (
    "B*S + 2*B - 3",
    "floor(B*S/4)",
    "ceiling(5*B*S/16) - floor(B/3)",
    "Max(1, Min(S, 2*B)) * B**2",
    "Mod(B*S, 7)",
    "Mod(S/2, 3/4)",
    "rint(S/2)",
    "f64(B*S*1/3)",
    "ceiling(f64(2476979795053773/2251799813685248*f64(S/8)))",
    "Abs(B - S)",
    "floor(5*B/6 - S/4 + 1/3)",
    "ceiling(f64(B/3) + S/2)",
    "floor(Max(B/2, S/3))",
)


@pytest.mark.parametrize("text", SIZES)
def test_a_size_has_the_value_that_sympy_computes(text: str) -> None:
    size = parse_dim(text)
    for b, s in itertools.product((0, 1, 2, 5, 17), (0, 1, 3, 8, 80, 1023)):
        value, expected = function_of(size)({"B": b, "S": s}), size.subs({B: b, S: s})
        assert value == expected
        assert isinstance(value, int) == bool(expected.is_Integer)


def test_powers_of_quotients_are_exact() -> None:
    assert function_of((B + 1) ** -2)({"B": 2}) * 9 == 1
    assert function_of(2 ** sympy.ceiling(B / 3))({"B": 7}) == 8
    with pytest.raises(ZeroDivisionError):
        function_of(1 / B)({"B": 0})


@pytest.mark.parametrize("size", [sympy.sqrt(B), sympy.log(B + 2)])
def test_what_is_not_rational_is_refused(size: sympy.Expr) -> None:
    with pytest.raises(IRError, match="is made with"):
        function_of(size)


PYTHON = {
    "isqrt(B)": math.isqrt,
    "bit_length(B)": int.bit_length,
    "pow2(B)": lambda n: 1 << n,
    "sqrt(B)": math.sqrt,
    "log(B)": math.log,
    "log2(B + 1)": lambda n: math.log2(n + 1),
    "log10(B)": math.log10,
    "exp(B/3)": lambda n: math.exp(n / 3),
    "power(B, 3/4)": lambda n: n**0.75,
    "f64(4503599627370496*log(B)/4947709893870347)": lambda n: math.log(n, 3),
}


@pytest.mark.parametrize("text", PYTHON)
def test_a_function_has_the_value_that_python_computes(text: str) -> None:
    """As an expression, and as the runtime reads its text."""
    size, rounded = parse_dim(text), parse_dim(f"floor(1000*{text})")
    for n in (1, 2, 3, 4, 8, 9, 100, 125, 216):
        expected = Fraction(PYTHON[text](n))
        assert function_of(size)({"B": n}) == expected
        assert size.subs({B: n}) == sympy.Rational(expected.numerator, expected.denominator)
        assert evaluate(show_dim(rounded), {"B": n}) == math.floor(1000 * expected)
    assert parse_dim(show_dim(size)) == size


@pytest.mark.parametrize(
    "text", ["log(B)", "log2(B)", "isqrt(B - 1)", "pow2(B - 1)", "sqrt(B - 1)"]
)
def test_a_function_without_a_value_raises_as_a_division_by_0(text: str) -> None:
    size = parse_dim(text)
    with pytest.raises(ZeroDivisionError):
        function_of(size)({"B": 0})
    assert evaluate(text, {"B": 0}) is None
    with pytest.raises(IRError, match="not a whole number"):
        evaluate_dim(size, {"B": 0})


def test_an_untrusted_power_takes_no_memory() -> None:
    assert evaluate("pow2(T)", {"T": 10**9}) is None
    assert evaluate("exp(T)", {"T": 10**9}) is None
    assert parse_dim("pow2(10**8)") is sympy.nan


def test_roots_and_logarithms_that_need_no_doubles() -> None:
    forms = {
        floor(sqrt(B)): "isqrt(B)",
        floor(power(B, sympy.Rational(1, 2))): "isqrt(B)",
        ceil(sqrt(B)): "isqrt(Max(0, B - 1)) + Min(1, B)",
        floor(log2(B)): "bit_length(B) - 1",
        floor(log2(2 * B + 1)): "bit_length(B)",
        ceil(log2(B)): "bit_length(B - 1)",
    }
    for size, text in forms.items():
        assert show_dim(size) == text
    near = {d + s for n in range(1, 20) for d in (2**n, n * n, 4**n) for s in (-1, 0, 1)}
    for n in sorted(near - {0}):
        assert evaluate("isqrt(Max(0, B - 1)) + Min(1, B)", {"B": n}) == math.ceil(math.sqrt(n))
        assert evaluate("isqrt(B)", {"B": n}) == int(math.sqrt(n)) == int(n**0.5)
        assert evaluate("bit_length(B) - 1", {"B": n}) == int(math.log2(n))
        assert evaluate("bit_length(B - 1)", {"B": n}) == math.ceil(math.log2(n))


def test_conditions_are_true_or_false() -> None:
    condition = sympy.And(sympy.Ge(B, 3), sympy.Not(sympy.Eq(sympy.floor(S / 2), B)))
    assert [function_of(condition)({"B": b, "S": 6}) for b in (2, 3, 4)] == [False, False, True]
