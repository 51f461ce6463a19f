"""Sizes that have a value on each side of a branch, as one expression."""

from __future__ import annotations

from typing import Any

import pytest
import sympy

from moec.capture.sizes.merged_size import Choice, Unmergeable
from moec.ir.replace_sizes import indicator
from moec.ir.sizes.dims import Bounds, symbol
from moec.ir.sizes.floats import f64
from moec.ir.sizes.thresholds import truth_of

T = symbol("T")

CONDITIONS = (
    *(T > 5, T >= 5, T < 5, T <= 5, sympy.Ne(T, 5), sympy.Eq(T, 5), sympy.Eq(sympy.Mod(T, 3), 0)),
    *(sympy.And(T > 3, T < 9), sympy.Or(T < 3, T > 9), sympy.Not(sympy.Eq(T, 7), evaluate=False)),
)


@pytest.mark.parametrize("condition", CONDITIONS, ids=str)
def test_an_indicator_is_one_where_its_condition_holds(condition: Any) -> None:
    value, truth = truth_of(indicator(condition)), truth_of(condition)
    assert all(value.value({"T": n}) == truth.holds({"T": n}) for n in range(20))


def choice(first: Any, second: Any) -> Choice:
    return Choice(first, second, {"T": Bounds(1)}, {"T": 24})


def test_a_size_of_both_sides_is_a_maximum_and_others_follow_from_it() -> None:
    sizes = choice(T // 4 >= 4, T // 4 < 4)
    greatest = sympy.Max(4, T // 4)
    assert sizes.size(T // 4, 4) == greatest
    assert sizes.size(8 * (T // 4) + 1, 33) == 8 * greatest + 1
    assert sizes.size(T, T) == T


def test_a_size_without_a_common_expression_is_not_merged() -> None:
    share = T * sympy.Rational(1, 3)
    with pytest.raises(Unmergeable):
        choice(f64(share) < 4, f64(share) >= 4).size(7, 2)
