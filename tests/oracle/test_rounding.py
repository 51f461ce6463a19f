"""A row is right, or as far off as another right result moves it; no row is excused."""

from __future__ import annotations

import math

import pytest
import torch

from moec.oracle.rounding import row_distances, rows_beyond

EXACT = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


def moved(row: int, by: float) -> torch.Tensor:
    result = EXACT.clone()
    result[row, 0] += by
    return result


def test_one_row_of_many_is_wrong() -> None:
    assert rows_beyond([[EXACT]], [[EXACT]], 1e-4) is None
    beyond = rows_beyond([[moved(7, 1.0)]], [[EXACT]], 1e-4)
    assert str(beyond).startswith("differs from eager by ")
    assert "in 1 of 40 rows, and at most 1e-04 is allowed" in str(beyond)


def test_another_right_result_explains_the_row_that_it_moves_as_far_and_no_other() -> None:
    beyond = rows_beyond([[moved(7, 1.0)]], [[EXACT]], 1e-4)
    assert beyond is not None
    assert beyond.explained_by([[moved(7, 0.9)]]) is None
    for sample in (moved(7, 0.7), moved(8, 9.0), moved(7, math.nan)):
        assert beyond.explained_by([[sample]]) is not None


def test_distances_are_relative_to_the_row_or_to_all() -> None:
    exact = torch.tensor([[1.0, 0.0], [100.0, 0.0]])
    actual = torch.tensor([[1.1, 0.0], [101.0, 0.0]])
    assert row_distances(actual, exact).tolist() == pytest.approx([0.1, 0.01])
    assert row_distances(actual, exact, False).tolist() == pytest.approx([0.001, 0.01])
    assert row_distances(actual[:1], exact).tolist() == [math.inf]
    assert row_distances(actual[:0], exact[:0]).tolist() == []


def test_integers_are_equal_or_not() -> None:
    exact = torch.tensor([[1, 2], [3, 4]])
    assert row_distances(torch.tensor([[1, 2], [3, 5]]), exact).tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_nan_in_the_last_of_many_rows_is_wrong(number: float) -> None:
    beyond = rows_beyond([[moved(39, number)]], [[EXACT]], 1e30)
    assert str(beyond) == (
        "1 of 40 rows differ from eager, by NaN or infinities that only one of them has"
    )
    assert beyond is not None
    assert beyond.explained_by([[moved(39, 9.0)]]) is not None


def test_a_row_of_float32_is_that_of_another_right_result() -> None:
    """An error of the same size, which `explained_by` takes for a choice, is not enough."""
    exact, other = [[torch.tensor([[1.0, 0.0]])]], [[torch.tensor([[0.0, 1.0]])]]
    wrong = [[torch.tensor([[0.0, -1.0]])]]
    beyond = rows_beyond(wrong, exact, 1e-4)
    assert beyond is not None
    assert beyond.explained_by(other) is None
    assert beyond.agreeing_with(wrong, other) is not None
    tied = rows_beyond(other, exact, 1e-4)
    assert tied is not None
    assert tied.agreeing_with(other, other) is None
