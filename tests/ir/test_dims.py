"""Sizes: algebra, text, and what a stranger's text may hold."""

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import IRError
from moec.ir.dims import bind, evaluate_dim, normal, parse_dim, product, show_dim, symbol, symbols

T, S = symbol("T"), symbol("S")


@pytest.mark.parametrize(
    "dim",
    [7, 0, T, 2 * T, T + 1, S * T, sympy.floor(T / 2), sympy.Mod(T, 4), sympy.Max(T, 1) - S],
    ids=str,
)
def test_text_and_back(dim):
    assert parse_dim(show_dim(normal(dim))) == normal(dim)


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "T.x", "f(T)", "T if T else 1", "1.5", "T**T", "T**99", "1/0", "'a'", ""],
)
def test_text_of_a_stranger_is_not_evaluated(text):
    with pytest.raises(IRError, match="is not a size"):
        parse_dim(text)


@given(t=st.integers(0, 99), s=st.integers(0, 99))
def test_values(t, s):
    env = {"T": t, "S": s}
    assert evaluate_dim(normal(2 * T + S), env) == 2 * t + s
    assert evaluate_dim(normal(sympy.floor(T / 2)), env) == t // 2
    assert evaluate_dim(product((S, T, 3)), env) == 3 * s * t


def test_a_size_needs_its_names():
    with pytest.raises(IRError, match=r"size S\*T needs \['S'\]"):
        evaluate_dim(normal(S * T), {"T": 1})


def test_a_size_is_whole():
    with pytest.raises(IRError, match="3/2, not a whole number"):
        evaluate_dim(normal(T / 2), {"T": 3})


def test_bind_learns_and_checks():
    env: dict[str, int] = {}
    bind((T, 4), (3, 4), env)
    assert env == {"T": 3}
    bind((2 * T,), (6,), env)
    with pytest.raises(IRError, match=r"axis 0 is 5, expected 2\*T = 6"):
        bind((2 * T,), (5,), env)
    with pytest.raises(IRError, match="rank 1, expected 2"):
        bind((T, 4), (3,), env)


def test_symbols():
    assert symbols(normal(2 * T * S)) == {"S", "T"}
    assert symbols(3) == set()
