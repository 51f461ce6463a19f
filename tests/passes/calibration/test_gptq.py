"""GPTQ against the plain form of its recursion, and for singular Hessians."""

from __future__ import annotations

import pytest
import torch

from moec.passes.calibration.gptq import (
    damp,
    factorise,
    hessian,
    retarget,
    solve,
    solve_ordered,
    squared_results,
)


def whole(column: torch.Tensor, k: int) -> torch.Tensor:
    return column.round()


def inputs(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated, as those of a layer are: independent ones leave nothing to make up for."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, max(width // 3, 1), generator=generator)
    mix = torch.randn(max(width // 3, 1), width, generator=generator)
    return few @ mix + 0.3 * torch.randn(rows, width, generator=generator)


def plain(weight: torch.Tensor, h: torch.Tensor, damping: float) -> torch.Tensor:
    """Optimal brain quantisation in a fixed order: the inverse Hessian of the columns that are
    left, inverted anew for each column, in float64 (arXiv 2210.17323, equation 2)."""
    w, result = weight.double(), torch.empty_like(weight, dtype=torch.float64)
    h = h.double() + damping * h.double().diagonal().mean() * torch.eye(len(h))
    for k in range(weight.shape[1]):
        inverse = torch.linalg.inv(h[k:, k:])
        result[:, k] = w[:, k].round()
        lost = (w[:, k] - result[:, k]) / inverse[0, 0]
        w = w.clone()
        w[:, k:] -= lost[:, None] * inverse[0]
    return result


@pytest.mark.parametrize("block", [1, 7, 128])
def test_it_is_the_plain_recursion(block):
    """Exactly: a rounding of float32 that crosses half would show, and none of these does."""
    torch.manual_seed(3)
    weight, h = torch.randn(9, 30) * 3, hessian(inputs(64, 30))
    solution = solve(weight, h, whole, 0.1, block)
    assert torch.equal(solution.weight.double(), plain(weight, h, 0.1))
    assert not solution.nearest


@pytest.mark.parametrize("width", [1, 63, 64, 200, 333])
def test_the_factor_is_that_of_the_damped_inverse(width):
    h = torch.stack([hessian(torch.randn(2 * width, width)) for _ in range(2)])
    factor = factorise(h, 0.01).factor.double()
    assert torch.equal(factor, factor.triu())
    expected = torch.linalg.cholesky(damp(h.double(), 0.01).inverse()).mT
    torch.testing.assert_close(factor, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", [1, 128, 300])
def test_squares_of_results_are_those_of_the_rows(width):
    weight, x = torch.randn(2, 7, width), torch.randn(2, 50, width)
    expected = float((x @ weight.mT).square().sum(dtype=torch.float64))
    assert squared_results(weight, hessian(x)) == pytest.approx(expected, rel=1e-5)


def test_results_are_closer_than_those_of_rounding_to_nearest():
    torch.manual_seed(0)
    weight, x = torch.randn(40, 96), inputs(300, 96)
    solution = solve(weight, hessian(x), whole).weight
    assert torch.equal(solution, solution.round())

    def off(rounded: torch.Tensor) -> float:
        return float((x @ (weight - rounded).T).norm())

    assert off(solution) < 0.75 * off(weight.round())


def test_experts_are_solved_as_a_batch_and_one_without_inputs_is_rounded():
    weight = torch.randn(3, 5, 12)
    h = torch.stack([hessian(inputs(40, 12, seed)) for seed in range(3)])
    h[1] = 0
    solution = solve(weight, h, whole)
    assert solution.nearest.tolist() == [False, True, False]
    assert torch.equal(solution.weight[1], weight[1].round())
    for e in (0, 2):
        assert torch.equal(solution.weight[e], solve(weight[e], h[e], whole).weight)


def test_inputs_that_are_always_zero_or_not_finite_do_no_harm():
    weight, x = torch.randn(5, 12), inputs(40, 12)
    x[:, 4] = 0
    solution = solve(weight, hessian(x), whole)
    assert torch.equal(solution.weight[:, 4], weight[:, 4].round())
    assert not solution.nearest
    x[0, 0] = torch.nan
    solution = solve(weight, hessian(x), whole)
    assert solution.nearest
    assert torch.equal(solution.weight, weight.round())


def test_the_grid_is_told_which_column_it_rounds():
    calls: list[int] = []

    def grid(column: torch.Tensor, k: int) -> torch.Tensor:
        calls.append(k)
        return column

    weight = torch.randn(4, 10)
    assert torch.equal(solve(weight, hessian(inputs(20, 10)), grid, block=3).weight, weight)
    assert calls == list(range(10))


def test_a_hessian_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"a Hessian \[3, 3\] for weights \[2, 4\]"):
        solve(torch.zeros(2, 4), torch.zeros(3, 3), whole)


def test_columns_of_large_inputs_come_first():
    """Each expert in its own order: the same as `solve` on columns that are sorted by hand."""
    weight = torch.randn(2, 5, 12)
    h = torch.stack([hessian(inputs(40, 12, seed)) for seed in range(2)])
    solution = solve_ordered(weight, h, torch.round)
    for e in range(2):
        order = h[e].diagonal().argsort(descending=True)
        assert order.tolist() != sorted(order.tolist())
        by_hand = solve(weight[e][:, order], h[e][order][:, order], whole).weight
        assert torch.equal(solution.weight[e][:, order], by_hand)


def test_what_is_aimed_at_is_the_original_result():
    """Least squares over the inputs as they are, against the results of those that were."""
    torch.manual_seed(1)
    was, weight = inputs(60, 12), torch.randn(5, 12)
    now = was + 0.3 * torch.randn(60, 12)
    solution = retarget(weight, was.T @ now, now.T @ now, damping=0)
    expected = torch.linalg.lstsq(now, was @ weight.T).solution.T
    torch.testing.assert_close(solution, expected, rtol=1e-3, atol=1e-3)


def test_inputs_that_stayed_or_were_never_seen_leave_the_weight():
    weight, h = torch.randn(2, 5, 12), torch.stack([hessian(inputs(40, 12)), torch.zeros(12, 12)])
    solution = retarget(weight, h, h)
    torch.testing.assert_close(solution[0], weight[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(solution[1], weight[1])
