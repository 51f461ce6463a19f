"""Weights rounded to a grid so that a layer's results, not its weights, stay close.

For y = W x over inputs X with the Hessian H = X X^T, columns are rounded one after the other, and
what a column loses is made up for by those that are still to come (GPTQ, arXiv 2210.17323, the
Cholesky form of its section 3.3). Any number of matrices at once: experts that share a shape are
solved as one batch (QMoE, arXiv 2310.16795, section 3.2).

    solved = solve(weight, hessian(rows), lambda column, k: column.round())
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.1
"""Share of the Hessian's mean diagonal that is added to it, as QMoE has it."""
BLOCK = 128

Grid = Callable[[Tensor, int], Tensor]
"""(column f32[.., N], its index) -> the values of the grid that stand for it, f32[.., N]."""


@dataclass(frozen=True, eq=False)
class Solved:
    """`weight` f32[.., N, K] on the grid; `nearest` bool[..]: matrices whose Hessian had no
    inverse (no input was seen), which are rounded to nearest."""

    weight: Tensor
    nearest: Tensor


def hessian(rows: Tensor) -> Tensor:
    """X X^T of inputs [.., R, K] -> f32[.., K, K]. Rows of zeros add nothing."""
    full = rows.float()
    return full.mT @ full


def solve(
    weight: Tensor, hessian: Tensor, grid: Grid, damping: float = DAMPING, block: int = BLOCK
) -> Solved:
    """weight [.., N, K] by its inputs' Hessian [.., K, K]; neither is changed.

    Raises ValueError where the two do not fit.
    """
    width = weight.shape[-1]
    if hessian.shape != (*weight.shape[:-2], width, width):
        raise ValueError(f"a Hessian {list(hessian.shape)} for weights {list(weight.shape)}")
    factor, nearest = _factor(hessian.float(), damping)
    left = weight.detach().to(torch.float32, copy=True)
    made = torch.empty_like(left)
    for start in range(0, width, block):
        stop = min(start + block, width)
        lost = torch.empty_like(left[..., start:stop])
        for k in range(start, stop):
            column = left[..., k]
            made[..., k] = grid(column, k)
            lost[..., k - start] = (column - made[..., k]) / factor[..., k, k, None]
            share = lost[..., k - start, None] * factor[..., k, None, k:stop]
            left[..., k:stop] -= share
        left[..., stop:] -= lost @ factor[..., start:stop, stop:]
    return Solved(made, nearest)


def _factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the damped Hessian's inverse; the identity, under which each
    column is rounded for itself, where there is none."""
    width = hessian.shape[-1]
    unit = torch.eye(width)
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    lower, info = torch.linalg.cholesky_ex(hessian + damping * mean * unit)
    singular = info != 0
    lower = torch.where(singular[..., None, None], unit, lower)
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    singular = singular | (info != 0) | ~upper.isfinite().all(-1).all(-1)
    return torch.where(singular[..., None, None], unit, upper), singular
