"""Codes changed one by one while a layer's results come closer: what GPTQ leaves to be gained.

For a row w of a matrix and the Hessian H of its inputs, codes and the numbers of their grid are to
make (q - w) H (q - w)^T least. Two steps take turns: every weight takes the code that gains most,
the others as they are, and the numbers of each row are fitted to its codes by least squares
(`refit`). Each round is kept by those rows alone that it made less, so that nothing ever becomes
worse, and it ends where no code moves. Rows do not depend on one another: any number of threads
gives the same codes.

    codes, grid = descend(ternary, weight, codes, grid, damped(hessian(rows)))

Source: coordinate descent on a layer's results, QuantEase, arXiv 2309.01885.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import numba
import torch
from torch import Tensor

ROUNDS = 20
SWEEPS = 4
"""Over a row's weights in a round, at most: then its numbers are fitted anew."""
LEAST = 1e-6
"""Share of what a change costs for itself below which a gain is taken for rounding."""


def descend(
    module: ModuleType,
    weight: Tensor,
    codes: Tensor,
    grid: Tensor,
    hessian: Tensor,
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor]:
    """Codes u8[.., N, K] and a grid bf16[.., N, 2] of `module` that stand for weight [.., N, K] no
    worse than those given, by the inputs' Hessian [.., K, K]; none of these is changed."""
    weight, hessian = weight.float(), hessian.float().contiguous()
    best = codes, grid
    slope, least = _slope(module, weight, *best, hessian)
    for _ in range(rounds):
        made = best[0].clone(memory_format=torch.contiguous_format)
        levels = module.levels(best[1]).contiguous()
        now = module.values(made, best[1])
        if not _descend(weight, now, made, levels, hessian, slope):
            break
        fitted = module.refit(weight, made, best[1], hessian)
        new, off = _slope(module, weight, made, fitted, hessian)
        less = (off < least)[..., None]
        best = torch.where(less, made, best[0]), torch.where(less, fitted, best[1])
        slope, least = torch.where(less, new, slope), torch.minimum(off, least)
        if not less.any():
            break
    return best


def _slope(
    module: ModuleType, weight: Tensor, codes: Tensor, grid: Tensor, hessian: Tensor
) -> tuple[Tensor, Tensor]:
    """(q - w) H f32[.., N, K], and what is to become least f32[.., N]."""
    off = module.values(codes, grid) - weight
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
    """Changes `codes`; how many changes there were."""
    *_, n, k = weight.shape
    own = slope.reshape(-1, k).clone().numpy()
    moved = torch.zeros(len(own), dtype=torch.int64)
    _sweep(
        now.reshape(-1, k).numpy(), codes.view(-1, k).numpy(),
        levels.view(-1, levels.shape[-1]).numpy(), hessian.view(-1, k, k).numpy(), own,
        n, moved.numpy(),
    )  # fmt: skip
    return int(moved.sum())


def _row(values: Any, codes: Any, levels: Any, hessian: Any, slope: Any) -> int:
    moved = 0
    for _ in range(SWEEPS):
        before = moved
        for j in range(len(codes)):
            cost, best, gain = hessian[j, j], codes[j], 0.0
            for c in range(len(levels)):
                step = levels[c] - values[j]
                change = step * (2 * slope[j] + step * cost)
                if change < gain - LEAST * cost * step * step:
                    best, gain = c, change
            if best != codes[j]:
                step = levels[best] - values[j]
                for i in range(len(slope)):
                    slope[i] += step * hessian[j, i]
                values[j], codes[j] = levels[best], best
                moved += 1
        if moved == before:
            break
    return moved


_one = cast(Any, numba.njit(_row))


def _rows(
    values: Any, codes: Any, levels: Any, hessian: Any, slope: Any, n: int, moved: Any
) -> None:
    for r in numba.prange(len(values)):
        moved[r] = _one(values[r], codes[r], levels[r], hessian[r // n], slope[r])


_sweep = cast(Any, numba.njit(parallel=True)(_rows))
