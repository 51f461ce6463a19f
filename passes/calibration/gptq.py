"""Weights rounded to a grid so that a layer's results, not its weights, stay close.

For y = W x over inputs X with the Hessian H = X X^T, columns are rounded one after the other, and
what a column loses is made up for by those that are still to come (GPTQ, arXiv 2210.17323, the
Cholesky form of its section 3.3). Any number of matrices at once: experts that share a shape are
solved as one batch (QMoE, arXiv 2310.16795, section 3.2).

    solved = solve(weight, hessian(rows), lambda column, k: column.round())

Where layers before have been rounded already, what enters is X' and no longer X: `aimed` gives the
weight whose results on X' come closest to W X, which is then solved in the place of W.
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


def solve_ordered(
    weight: Tensor, hessian: Tensor, grid: Callable[[Tensor], Tensor], damping: float = DAMPING
) -> Solved:
    """`solve` with the columns of the largest inputs first, so that the others are left to make up
    for them (the act-order of GPTQ's authors). The grid is the same for all columns."""
    order = hessian.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)
    columns = order[..., None, :]
    own = hessian.gather(-1, columns.expand_as(hessian))
    own = own.gather(-2, order[..., None].expand_as(hessian))
    columns = columns.expand_as(weight)
    made = solve(weight.gather(-1, columns), own, lambda column, _: grid(column), damping)
    return Solved(torch.empty_like(made.weight).scatter_(-1, columns, made.weight), made.nearest)


def damped(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The Hessian [.., K, K] with a share of the mean of its diagonal added to that."""
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return hessian + damping * mean * torch.eye(hessian.shape[-1])


def aimed(weight: Tensor, cross: Tensor, hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The weight V that makes |V X' - W X|^2 least, drawn to W by the damping: f32[.., N, K].

    `cross` [.., K, K] is X X'^T, X the inputs as they were, and `hessian` X' X'^T. W itself where
    the damped Hessian has no inverse. (The closed form for one layer, V = W X X'^T (X' X'^T)^-1.)
    """
    hessian = hessian.float()
    known = damped(hessian, damping)
    lower, info = torch.linalg.cholesky_ex(known)
    singular = (info != 0)[..., None, None]
    wanted = weight.float() @ (cross.float() + (known - hessian))
    unit = torch.eye(hessian.shape[-1])
    made = torch.cholesky_solve(wanted.mT, torch.where(singular, unit, lower)).mT
    return torch.where(singular | ~made.isfinite().all(-1).all(-1)[..., None, None], weight, made)


def _factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the damped Hessian's inverse; the identity, under which each
    column is rounded for itself, where there is none."""
    unit = torch.eye(hessian.shape[-1])
    lower, info = torch.linalg.cholesky_ex(damped(hessian, damping))
    singular = info != 0
    lower = torch.where(singular[..., None, None], unit, lower)
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    singular = singular | (info != 0) | ~upper.isfinite().all(-1).all(-1)
    return torch.where(singular[..., None, None], unit, upper), singular
