"""In 16 bits eager's own error is the yardstick: rounding and near ties are excused, no more."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.oracle.rounding import UNIT, excess, of_distinct_rows, row_distances

ROWS, WIDTH = 200, 32


def drawn(seed: int, size: float = 1e-2, rows: int = ROWS) -> torch.Tensor:
    """f64[rows]: the errors of rows that differ by rounding."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) * size
    return noise.square().mean(-1).sqrt()


def refused(ours: torch.Tensor, eager: torch.Tensor) -> bool:
    return excess(ours, eager[None], UNIT["bf16"]) is not None


@settings(max_examples=60)
@given(st.integers(0, 10_000))
def test_two_samples_of_one_rounding_agree(seed: int) -> None:
    assert not refused(drawn(2 * seed), drawn(2 * seed + 1))


def test_less_error_than_eager_is_right() -> None:
    assert not refused(drawn(0) / 3, drawn(1))
    assert not refused(torch.zeros(ROWS, dtype=torch.float64), drawn(1))


def test_more_error_in_all_rows_is_wrong() -> None:
    assert refused(drawn(0) * 1.6, drawn(1))
    words = str(excess(drawn(0) * 1.6, drawn(1)[None], UNIT["bf16"]))
    assert words.startswith(("the mean error of a row is 1.", "1"))


def test_more_error_in_the_rows_of_one_expert_is_wrong() -> None:
    """An error of 2 % in one expert of four, top-1: a quarter of the rows is off."""
    ours = drawn(0)
    ours[::4] += 2e-2
    assert refused(ours, drawn(1))


def test_as_many_rows_at_other_experts_as_in_eager_are_right() -> None:
    ours, eager = drawn(0), drawn(1)
    ours[[3, 40, 77]] = 0.7
    eager[[5, 90]] = 0.9
    assert not refused(ours, eager)


def test_many_more_rows_at_other_experts_are_wrong() -> None:
    ours, eager = drawn(0), drawn(1)
    ours[:12] = 0.7
    eager[:2] = 0.9
    why = excess(ours, eager[None], UNIT["bf16"])
    assert why is not None


def test_where_eager_is_exact_the_rounding_of_the_result_is_allowed() -> None:
    exact = torch.zeros(ROWS, dtype=torch.float64)
    assert not refused(torch.full_like(exact, UNIT["bf16"] / 2), exact)
    assert refused(torch.full_like(exact, 3 * UNIT["bf16"]), exact)


def test_equal_rows_are_one_sample() -> None:
    """Thousands of rows of padding: all of them are off by one rounding, or none is."""
    exact = torch.cat([torch.randn(3, 4), torch.zeros(500, 4), torch.ones(200, 4)])
    errors = torch.cat([torch.tensor([0.1, 0.2, 0.3]), torch.full((700,), 0.4)]).double()
    errors[50], errors[600] = 0.9, 0.5
    distinct = of_distinct_rows(errors.expand(2, 1, -1), exact)
    assert distinct.shape == (2, 1, 5)
    assert sorted(distinct[0, 0].tolist()) == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.9])
    assert torch.equal(of_distinct_rows(errors[:0], exact[:0]), errors[:0])
    half = torch.randn(20, 8).half()
    assert of_distinct_rows(errors[:20], half).shape == (20,)
    infinite = torch.tensor([[1.0, math.inf], [1.0, math.nan], [2.0, 0.0]])
    assert of_distinct_rows(errors[:3], infinite).shape == (3,)


def test_no_rows_have_no_error() -> None:
    assert not refused(torch.zeros(0), torch.zeros(0))


def test_distances_are_relative_to_the_row() -> None:
    exact = torch.tensor([[1.0, 0.0], [100.0, 0.0]])
    actual = torch.tensor([[1.1, 0.0], [101.0, 0.0]])
    greatest, mean_square = row_distances(actual, exact)
    assert torch.allclose(greatest, torch.tensor([0.1, 0.01], dtype=torch.float64), atol=1e-7)
    assert torch.allclose(mean_square, greatest)


def test_what_is_not_finite_must_be_the_same() -> None:
    exact = torch.tensor([[1.0, float("nan")], [float("inf"), 1.0], [1.0, 2.0]])
    assert row_distances(exact.clone(), exact).tolist() == [[0.0] * 3] * 2
    other = torch.tensor([[1.0, 2.0], [float("-inf"), 1.0], [1.0, float("nan")]])
    assert row_distances(other, exact).tolist() == [[float("inf")] * 3] * 2


def test_integers_are_equal_or_not() -> None:
    exact = torch.tensor([[1, 2], [3, 4]])
    assert row_distances(torch.tensor([[1, 2], [3, 5]]), exact).tolist() == [[0.0, 1.0]] * 2


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_nan_in_the_last_of_many_rows_is_no_chance(number: float) -> None:
    exact = torch.randn(1000, 8)
    rounded = row_distances(exact.bfloat16(), exact)[0][None]
    broken = exact.clone()
    broken[-1, 3] = number
    ours = row_distances(broken, exact)[0]
    assert str(excess(ours, rounded, UNIT["bf16"])) == (
        "1 of 1000 rows have NaN or infinities that eager has not"
    )
    assert excess(ours, torch.cat([rounded, ours[None]]), UNIT["bf16"]) is None
