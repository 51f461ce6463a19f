"""Coordinate descent over codes: single changes that reduce the error of a layer after GPTQ.

For a row w of a matrix and the Hessian H of its inputs, codes and the numbers of their grid are to
minimise (q - w) H (q - w)^T. Two steps alternate: every weight takes the code that reduces the
error most with the others fixed, and the numbers of each row are fitted to its codes by least
squares (`refit`). A round changes only the rows whose error it reduced, so that no error grows, and
the descent ends where no code changes. Rows are independent: any number of threads gives the same
codes.

    codes, grid = descend(weight, codes, grid, damped(hessian(rows)))

Source: coordinate descent on a layer's results, QuantEase, arXiv 2309.01885.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.ir.formats import ternary

ROUNDS = 20


def descend(
    weight: Tensor,
    codes: Tensor,
    grid: Tensor,
    hessian: Tensor,
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor]:
    """Codes u8[.., N, K] and a grid bf16[.., N, 2] for ternary weight [.., N, K], whose error
    by the inputs' Hessian [.., K, K] is at most that of the arguments. No argument is changed."""
    weight, hessian = weight.float(), hessian.float().contiguous()
    best = codes, grid
    slope, least = _slope(weight, *best, hessian)
    for _ in range(rounds):
        candidate = best[0].clone(memory_format=torch.contiguous_format)
        levels = ternary.levels(best[1]).contiguous()
        now = ternary.values(candidate, best[1])
        if not _descend(weight, now, candidate, levels, hessian, slope):
            break
        fitted = ternary.refit(weight, candidate, best[1], hessian)
        new, off = _slope(weight, candidate, fitted, hessian)
        less = (off < least)[..., None]
        best = torch.where(less, candidate, best[0]), torch.where(less, fitted, best[1])
        slope, least = torch.where(less, new, slope), torch.minimum(off, least)
        if not less.any():
            break
    return best


def _slope(weight: Tensor, codes: Tensor, grid: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """(q - w) H, f32[.., N, K], and the error to minimise, f32[.., N]."""
    off = ternary.values(codes, grid) - weight
    slope: Tensor = off @ hessian
    return slope, (slope * off).sum(-1)


def _descend(
    weight: Tensor,
    now: Tensor,
    codes: Tensor,
    levels: Tensor,
    hessian: Tensor,
    slope: Tensor,
) -> int:
    """Changes `codes` in place. Returns the number of changes."""
    from moec.passes.calibration.code_sweeps import sweep

    *_, n, k = weight.shape
    row_slopes = slope.reshape(-1, k).clone().numpy()
    moved = torch.zeros(len(row_slopes), dtype=torch.int64)
    sweep(
        now.reshape(-1, k).numpy(), codes.view(-1, k).numpy(),
        levels.view(-1, levels.shape[-1]).numpy(), hessian.view(-1, k, k).numpy(), row_slopes,
        n, moved.numpy(),
    )  # fmt: skip
    return int(moved.sum())
