"""Rounds weights to a grid so that the error of a layer's results is small.

For y = W x over inputs X with the Hessian H = X X^T, columns are rounded one after the other, and
the error of a column is compensated by the columns that follow (GPTQ, arXiv 2210.17323, the
Cholesky form of its section 3.3). Matrices of one shape, such as experts, are solved as one batch
(QMoE, arXiv 2310.16795, section 3.2).

    solved = solve(weight, hessian(rows), lambda column, k: column.round())

If earlier layers are already rounded, the inputs are X' instead of X: `retarget` returns the weight
whose results on X' are closest to W X, which is then solved in place of W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.1
"""Share of the Hessian's mean diagonal that is added to it, as QMoE has it."""
BLOCK = 16
"""Columns whose losses are passed on one by one, not as a product of matrices."""
SQUARED = 128
"""Columns whose products with those before them are computed at once."""
INVERTED = 64
"""Columns of a triangular matrix that are inverted one by one."""

Grid = Callable[[Tensor, int], Tensor]
"""(column f32[.., N], its index) -> the values of the grid for it, f32[.., N]."""


@dataclass(frozen=True, eq=False)
class Solved:
    """`weight` f32[.., N, K] on the grid; `nearest` bool[..] marks the matrices that were rounded
    to nearest, as their Hessian is singular (they had no inputs)."""

    weight: Tensor
    nearest: Tensor


@dataclass(frozen=True, eq=False)
class Factored:
    """The upper Cholesky `factor` of the damped Hessian's inverse, f32[.., K, K], and whether the
    Hessian is `singular`, bool[..]: the factor is then the identity, which rounds to nearest."""

    factor: Tensor
    singular: Tensor


def hessian(rows: Tensor) -> Tensor:
    """X X^T of inputs [.., R, K] -> f32[.., K, K]. Rows of zeros add nothing."""
    full = rows.float()
    return full.mT @ full


def squared_results(weight: Tensor, hessian: Tensor) -> float:
    """The sum of the squares of all results W x of weights [.., N, K], given the Hessian. Products
    of two columns are computed once: the Hessian is symmetric."""
    total, width = 0.0, weight.shape[-1]
    for start in range(0, width, SQUARED):
        stop = start + SQUARED
        part, before = weight[..., start:stop], hessian[..., :start, start:stop]
        products = (weight[..., :start] @ before).mul_(2)
        products += part @ hessian[..., start:stop, start:stop]
        total += float(products.mul_(part).sum((-1, -2)).sum(dtype=torch.float64))
    return max(total, 0.0)


def solve(
    weight: Tensor, hessian: Tensor, grid: Grid, damping: float = DAMPING, block: int = BLOCK
) -> Solved:
    """Round weight [.., N, K] to the grid, given its inputs' Hessian [.., K, K].

    Raises ValueError if the shapes do not match.
    """
    width = weight.shape[-1]
    if hessian.shape != (*weight.shape[:-2], width, width):
        raise ValueError(f"a Hessian {list(hessian.shape)} for weights {list(weight.shape)}")
    return solve_factored(weight, factorise(hessian.float(), damping), grid, block)


def solve_factored(weight: Tensor, factored: Factored, grid: Grid, block: int = BLOCK) -> Solved:
    """`solve`, given the factors: matrices that multiply the same rows share them."""
    # Columns lie side by side here: one of them is read and written without gaps.
    left = weight.detach().mT.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    rounded = torch.empty_like(left)
    _round_columns(left, rounded, factored.factor, grid, block, 0, weight.shape[-1])
    return Solved(rounded.mT, factored.singular)


def _round_columns(
    left: Tensor, rounded: Tensor, factor: Tensor, grid: Grid, block: int, start: int, stop: int
) -> None:
    """Rounds the columns from `start` to `stop`; what each lost, scaled, replaces it in `left`."""
    if stop - start > block:
        half = start + (stop - start + 1) // 2
        _round_columns(left, rounded, factor, grid, block, start, half)
        left[..., half:stop, :] -= factor[..., start:half, half:stop].mT @ left[..., start:half, :]
        _round_columns(left, rounded, factor, grid, block, half, stop)
        return
    for k in range(start, stop):
        column = left[..., k, :]
        rounded[..., k, :] = values = grid(column, k)
        column.sub_(values).div_(factor[..., k, k, None])
        shares = factor[..., k, k + 1 : stop, None]
        left[..., k + 1 : stop, :].addcmul_(shares, column[..., None, :], value=-1)


def solve_ordered(
    weight: Tensor, hessian: Tensor, grid: Callable[[Tensor], Tensor], damping: float = DAMPING
) -> Solved:
    """`solve` with the columns of the largest inputs first, so that the others compensate them
    (the act-order of GPTQ's authors). The grid is the same for all columns."""
    order = hessian.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)
    columns = order[..., None, :]
    ordered = hessian.gather(-1, columns.expand_as(hessian))
    ordered = ordered.gather(-2, order[..., None].expand_as(hessian))
    columns = columns.expand_as(weight)
    solved = solve(weight.gather(-1, columns), ordered, lambda column, _: grid(column), damping)
    return Solved(
        torch.empty_like(solved.weight).scatter_(-1, columns, solved.weight), solved.nearest
    )


def damp(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The Hessian [.., K, K] with a share of the mean of its diagonal added to that."""
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return hessian + damping * mean * torch.eye(hessian.shape[-1])


def retarget(weight: Tensor, cross: Tensor, hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The weight V that minimises |V X' - W X|^2, regularised towards W by the damping: f32[.., N,
    K].

    `cross` [.., K, K] is X X'^T, with X the original inputs, and `hessian` is X' X'^T. Returns W if
    the damped Hessian has no inverse. (The closed form for one layer is V = W X X'^T (X' X'^T)^-1.)
    """
    hessian = hessian.float()
    damped_hessian = damp(hessian, damping)
    lower, info = torch.linalg.cholesky_ex(damped_hessian)
    singular = (info != 0)[..., None, None]
    rhs = weight.float() @ (cross.float() + (damped_hessian - hessian))
    unit = torch.eye(hessian.shape[-1])
    solution = torch.cholesky_solve(rhs.mT, torch.where(singular, unit, lower)).mT
    return torch.where(
        singular | ~solution.isfinite().all(-1).all(-1)[..., None, None], weight, solution
    )


def factorise(hessian: Tensor, damping: float) -> Factored:
    # With the columns in reverse L L^T is the Hessian; in order again, L is upper, as its inverse,
    # which is the factor: no inverse Hessian is needed.
    unit = torch.eye(hessian.shape[-1])
    lower, info = torch.linalg.cholesky_ex(damp(hessian, damping).flip(-2, -1))
    upper = _inverse(lower).flip(-2, -1)
    singular = (info != 0) | ~upper.sum((-2, -1)).isfinite()
    upper[singular] = unit
    return Factored(upper, singular)


def _inverse(lower: Tensor) -> Tensor:
    """Of lower triangular matrices [.., K, K]; their halves are inverted, and multiplied."""
    width = lower.shape[-1]
    if width <= INVERTED:
        unit = torch.eye(width)
        leaf: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
        return leaf
    half, inverse = width // 2, torch.zeros_like(lower)
    first = inverse[..., :half, :half] = _inverse(lower[..., :half, :half])
    last = inverse[..., half:, half:] = _inverse(lower[..., half:, half:])
    inverse[..., half:, :half] = -(last @ (lower[..., half:, :half] @ first))
    return inverse
