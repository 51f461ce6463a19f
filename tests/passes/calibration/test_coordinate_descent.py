"""Coordinate descent over codes never increases the error, and ends at a local minimum."""

from __future__ import annotations

import numba
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.ir.formats import ternary
from moec.passes.calibration.coordinate_descent import descend
from moec.passes.calibration.gptq import damp, hessian


def case(seed: int, rows: int, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [2, 5, width], and the damped Hessian of rows that hang together."""
    torch.manual_seed(seed)
    x = torch.randn(2, rows, width) + torch.randn(2, rows, 1)
    return torch.randn(2, 5, width), damp(hessian(x))


def start(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    grid = ternary.grid_of(weight)
    return ternary.codes_of(weight, grid), grid


def lost(
    weight: torch.Tensor,
    codes: torch.Tensor,
    grid: torch.Tensor,
    hessian: torch.Tensor,
) -> torch.Tensor:
    """Of each row, in float64."""
    off = (ternary.values(codes, grid) - weight).double()
    return ((off @ hessian.double()) * off).sum(-1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(0, 30), rounds=st.integers(0, 6))
def test_no_row_becomes_worse(seed, rows, rounds):
    """But for what float32 rounds."""
    weight, hessian = case(seed, rows)
    codes, grid = start(weight)
    copies = codes.clone(), grid.clone(), hessian.clone()
    before = lost(weight, codes, grid, hessian)
    solution = descend(weight, codes, grid, hessian, rounds)
    after = lost(weight, *solution, hessian)
    assert (after <= before * (1 + 1e-5)).all()
    assert solution[1].isfinite().all()
    for tensor, old in zip((codes, grid, hessian), copies, strict=True):
        assert torch.equal(tensor, old)


def test_more_rounds_lose_less_and_it_ends():
    weight, hessian = case(0, 40)
    begin = start(weight)
    losses = [
        float(lost(weight, *descend(weight, *begin, hessian, rounds), hessian).sum())
        for rounds in (0, 1, 2, 50, 1000)
    ]
    assert losses[0] > losses[1] > losses[2] >= losses[3]
    assert losses[3] == losses[4]
    assert losses[3] < 0.8 * losses[0]


def test_no_single_code_is_left_that_would_help():
    """By more than the numbers' rounding to bf16 moved them after the last code."""
    weight, hessian = case(1, 40)
    codes, grid = descend(weight, *start(weight), hessian, 100)
    least = lost(weight, codes, grid, hessian)
    for j in range(weight.shape[-1]):
        for code in range(ternary.levels(grid).shape[-1]):
            other = codes.clone()
            other[..., j] = code
            assert (lost(weight, other, grid, hessian) >= least * (1 - 1e-2)).all()


def test_it_is_the_same_every_time_and_on_any_number_of_threads():
    weight, hessian = case(2, 40)
    begin = start(weight)
    first = descend(weight, *begin, hessian)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        again = descend(weight, *begin, hessian)
    finally:
        numba.set_num_threads(before)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_each_matrix_is_fitted_by_its_own_hessian():
    weight, hessian = case(3, 40)
    begin = start(weight)
    together = descend(weight, *begin, hessian)
    for e in range(2):
        alone = descend(weight[e], *(part[e] for part in begin), hessian[e])
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[e], b)


def test_inputs_that_are_never_seen_change_nothing():
    """No rows at all, and one input that is always 0 without damping."""
    weight, _ = case(4, 40)
    begin = start(weight)
    solution = descend(weight, *begin, torch.zeros(2, 12, 12))
    for a, b in zip(solution, begin, strict=True):
        assert torch.equal(a, b)
    x = torch.randn(2, 40, 12)
    x[..., 5] = 0
    codes, grid = descend(weight, *begin, hessian(x))
    assert torch.equal(codes[..., 5], begin[0][..., 5])
    assert grid.isfinite().all()


def test_codes_and_weights_that_lie_in_any_order():
    weight, hessian = case(5, 40)
    codes, grid = start(weight)
    expected = descend(weight, codes, grid, hessian)
    turned = codes.mT.contiguous().mT, grid.mT.contiguous().mT
    solution = descend(weight.mT.contiguous().mT, *turned, hessian.mT)
    for a, b in zip(solution, expected, strict=True):
        assert torch.equal(a, b)


def test_a_row_of_zeros_stays_one():
    weight, hessian = case(6, 40)
    weight[0, 2] = 0
    codes, grid = descend(weight, *start(weight), hessian)
    assert not ternary.values(codes, grid)[0, 2].any()
