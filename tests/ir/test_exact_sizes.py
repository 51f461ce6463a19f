"""Sizes as functions: sympy's own substitution is the oracle."""

from __future__ import annotations

import itertools

import pytest
import sympy

from moec.errors import IRError
from moec.ir.dims import parse_dim, symbol
from moec.ir.exact_sizes import function_of

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


def test_conditions_are_true_or_false() -> None:
    condition = sympy.And(sympy.Ge(B, 3), sympy.Not(sympy.Eq(sympy.floor(S / 2), B)))
    assert [function_of(condition)({"B": b, "S": 6}) for b in (2, 3, 4)] == [False, False, True]
