"""Sizes: algebra, text, and which texts from untrusted files are accepted."""

import math

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import IRError
from moec.ir.sizes.dims import (
    bind_shape,
    canonical,
    evaluate_dim,
    from_torch,
    parse_dim,
    product,
    show_dim,
    symbol,
    symbols,
)
from moec.ir.sizes.floats import ceil, check, f64, floor, round_half_even, trunc
from moec.runtime.sizes.expressions import evaluate

T, S = symbol("T"), symbol("S")


@pytest.mark.parametrize(
    "dim",
    [7, 0, T, 2 * T, T + 1, S * T, sympy.floor(T / 2), sympy.Mod(T, 4), sympy.Max(T, 1) - S],
    ids=str,
)
def test_text_and_back(dim):
    assert parse_dim(show_dim(canonical(dim))) == canonical(dim)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "T.x",
        "f(T)",
        "T if T else 1",
        "1.5",
        "T**T",
        "T**99",
        "1/0",
        "'a'",
        "",
        "((((9**8)**8)**8)**8)**8",
        "*".join(["(T+S)"] * 50),
        "T+" * 600 + "T",
    ],
)
def test_text_of_a_stranger_is_not_evaluated(text):
    with pytest.raises(IRError, match=r"is not a (valid )?size"):
        parse_dim(text)


@given(t=st.integers(0, 99), s=st.integers(0, 99))
def test_values(t, s):
    env = {"T": t, "S": s}
    assert evaluate_dim(canonical(2 * T + S), env) == 2 * t + s
    assert evaluate_dim(canonical(sympy.floor(T / 2)), env) == t // 2
    assert evaluate_dim(product((S, T, 3)), env) == 3 * s * t


def test_a_size_needs_its_names():
    with pytest.raises(IRError, match=r"size S\*T needs \['S'\]"):
        evaluate_dim(canonical(S * T), {"T": 1})


def test_a_size_is_whole():
    with pytest.raises(IRError, match="3/2, not a whole number"):
        evaluate_dim(canonical(T / 2), {"T": 3})


def test_bind_learns_and_checks():
    env: dict[str, int] = {}
    bind_shape((T, 4), (3, 4), env)
    assert env == {"T": 3}
    bind_shape((2 * T,), (6,), env)
    with pytest.raises(IRError, match=r"axis 0 is 5, expected 2\*T = 6"):
        bind_shape((2 * T,), (5,), env)
    with pytest.raises(IRError, match="rank 1, expected 2"):
        bind_shape((T, 4), (3,), env)


def test_symbols():
    assert symbols(canonical(2 * T * S)) == {"S", "T"}
    assert symbols(3) == set()


@given(n=st.integers(0, 10**6), factor=st.floats(0.01, 100), parts=st.integers(1, 512))
def test_f64_is_what_python_rounds(n, factor, parts):
    """As a size, and as the runtime reads its text."""
    exact = sympy.Rational(*factor.as_integer_ratio())
    product = f64(exact * T)
    for dim, expected in (
        (trunc(f64(product / parts)), int(n * factor / parts)),
        (ceil(f64(f64(T / parts) * exact)), math.ceil(n / parts * factor)),
        (round_half_even(product), round(n * factor)),
        (floor(f64(product + exact)), math.floor(n * factor + factor)),
    ):
        check(dim)
        assert evaluate_dim(dim, {"T": n}) == expected
        assert parse_dim(show_dim(dim)) == dim
        assert evaluate(show_dim(dim), {"T": n}) == expected


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (trunc(f64(f64(2 * T) / 8)), "floor(T/4)"),
        (ceil(f64(T / 3)), "ceiling(T/3)"),
        (ceil(f64(f64(sympy.Rational(5, 4) * T) / 6)), "ceiling(5*T/24)"),
        (round_half_even(f64(T / 2)), "rint(T/2)"),
        (trunc(f64(f64(T / 2) - 3)), "Max(0, floor(T/2) - 3) + Min(0, ceiling(T/2) - 3)"),
    ],
)
def test_what_doubles_cannot_change_is_an_integer_form(size, text):
    assert show_dim(size) == text


def test_what_is_no_operation_on_doubles_is_refused():
    tenth = sympy.Rational(*(0.1).as_integer_ratio())
    with pytest.raises(ValueError, match="more than one operation on doubles"):
        check(f64(f64(tenth * T) + f64(tenth * S) + f64(T / 3)))


def test_a_size_of_torch_has_one_form():
    """torch writes the rows of joined lengths as a product or as a sum, by how they came about."""
    b, p, q = (sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "s1", "s2"))
    rename = {"s0": "B", "s1": "P", "s2": "Q"}
    assert from_torch(b * (p + q), rename) == from_torch(b * p + b * q, rename)


def test_a_length_that_is_never_negative_has_no_maximum():
    """torch writes the length of a slice as a maximum with 0."""
    s0 = sympy.Symbol("s0", integer=True)
    size = 4 * sympy.ceiling(s0 / 4)
    assert from_torch(sympy.Max(0, size), {"s0": "T"}) == from_torch(size, {"s0": "T"})
    assert str(from_torch(sympy.Max(0, size - 5), {"s0": "T"})).startswith("Max(0, ")
    assert str(from_torch(sympy.Max(2, size), {"s0": "T"})).startswith("Max(2, ")
