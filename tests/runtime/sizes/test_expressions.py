"""Sizes as text: the same values as sympy, and no other text is ever evaluated."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import ArtifactError
from moec.ir.sizes.dims import Dim, evaluate_dim, parse_dim, show_dim, symbol
from moec.runtime.sizes.expressions import evaluate, names, solve

T, B = symbol("T"), symbol("B")


def grown(inner: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Expr]:
    return st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: a - b, inner, inner),
        st.builds(lambda a, b: a * b, inner, inner),
        st.builds(lambda a, n: sympy.floor(a / n), inner, st.integers(1, 9)),
        st.builds(lambda a, n: sympy.ceiling(a / n), inner, st.integers(1, 9)),
        st.builds(lambda a, n: sympy.Mod(a, n), inner, st.integers(1, 9)),
        st.builds(sympy.Max, inner, inner),
        st.builds(sympy.Min, inner, inner),
        st.builds(abs, inner),
    )


expressions = st.recursive(
    st.sampled_from([T, B, sympy.Integer(3), sympy.Integer(1)]), grown, max_leaves=5
)


@given(expressions, st.integers(0, 50), st.integers(0, 50))
def test_agrees_with_sympy(expression: sympy.Expr, t: int, b: int) -> None:
    env = {"T": t, "B": b}
    text = show_dim(expression)
    dim: Dim = parse_dim(text)
    assert evaluate(text, env) == evaluate_dim(dim, env)
    assert names(text) >= {s.name for s in getattr(dim, "free_symbols", set())}


def test_what_cannot_be_known() -> None:
    assert evaluate("2*T", {}) is None
    assert evaluate("T/2", {"T": 3}) is None
    assert evaluate("T/B", {"T": 3, "B": 0}) is None
    assert evaluate(7, {}) == 7
    assert names(7) == frozenset()


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 50))
def test_solves_what_is_affine(a: int, b: int, n: int) -> None:
    assert solve(f"{a}*T + {b}", a * n + b) == ("T", n)
    if a > 1:
        assert solve(f"{a}*T + {b}", a * n + b + 1) is None


@pytest.mark.parametrize("size", [4, "T*B", "floor(T/2)", "Max(T, 4)", "3", "T/2", "T - 9"])
def test_solves_nothing_else(size: int | str) -> None:
    assert solve(size, 3 if size != "T - 9" else -10) is None


@pytest.mark.parametrize(
    "text",
    [
        "", "T +", "T.real", "T[0]", "f(T)", "floor(T, T)", "Mod(T)", "floor(a=T)", "1.5*T", "'T'",
        "lambda: T", "T if T else 1", "T and B", "not T", "~T", "T**T", "T**9", "9**9**9", "T @ B",
        "T // 2", "T << 9", "[T]", "__import__('os').system('true')", "(lambda: T)()", "T" * 2000,
        "(" * 300 + "T" + ")" * 300, "T\0", "True",
    ],
)  # fmt: skip
def test_refuses_whatever_is_not_a_size(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"is not a (valid )?size"):
        evaluate(text, {"B": 2})
    with pytest.raises(ArtifactError, match=r"is not a (valid )?size"):
        names(text)
