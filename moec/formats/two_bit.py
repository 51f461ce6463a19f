"""Weights of two bits: w = step * (code - zero), codes 0 to 3, a step and a zero for each row.

The zero is a code, so that 0 stays 0. Codes are stored as two bit planes: a 64-bit word holds the
low bits of 32 consecutive codes in its lower half, and their high bits in its upper half. (The grid
is GPTQ's, arXiv 2210.17323, for two bits, the baseline of QMoE, arXiv 2310.16795, table 4.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.formats.integer import TINY

NEIGHBOURS = 32
_LEVELS = 4


def words(width: int) -> int:
    """The number of words in a row of `width` codes."""
    return -(-width // NEIGHBOURS)


def grid_of(weight: Tensor) -> Tensor:
    """The step and the zero of each row of [.., N, K]: bf16[.., N, 2]. Rows of zeros have
    step 1."""
    low, high = torch.aminmax(weight.detach().float(), dim=-1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = ((high - low) / (_LEVELS - 1)).bfloat16()
    step = torch.where(step.float() > TINY, step, torch.ones_like(step))
    zero = (-low / step.float()).round().clamp(0, _LEVELS - 1)
    return torch.stack([step, zero.bfloat16()], -1)


def scale_grid(grid: Tensor, share: float) -> Tensor:
    """The step times `share`; the zero is a code and stays."""
    step, zero = grid.float().unbind(-1)
    return torch.stack([step * share, zero], -1).bfloat16()


def codes_of(weight: Tensor, grid: Tensor) -> Tensor:
    """The nearest codes u8[.., N, K]."""
    step, zero = (part[..., None] for part in grid.float().unbind(-1))
    return (weight / step + zero).round().clamp(0, _LEVELS - 1).to(torch.uint8)


def levels(grid: Tensor) -> Tensor:
    """f32[.., N, 4]: the value of each code, by row."""
    return values(torch.arange(_LEVELS), grid)


def values(codes: Tensor, grid: Tensor) -> Tensor:
    """f32[.., N, K]: the values of codes."""
    step, zero = (part[..., None] for part in grid.float().unbind(-1))
    return step * (codes.float() - zero)


def refit(weight: Tensor, codes: Tensor, grid: Tensor, hessian: Tensor) -> Tensor:
    """The step of each row that brings the results of its codes closest to those of `weight`
    [.., N, K], by least squares under the inputs' Hessian [.., K, K]; zeros stay: bf16[.., N, 2].

    A step stays too where all of its row's inputs are 0.
    """
    step, zero = grid.float().unbind(-1)
    levels = codes.float() - zero[..., None]
    products = levels @ hessian
    fitted = (products * weight.float()).sum(-1) / (products * levels).sum(-1)
    step = torch.where(fitted.isfinite() & (fitted > TINY), fitted, step)
    return torch.stack([step, zero], -1).bfloat16()


def encode(codes: Tensor) -> Tensor:
    """codes u8[.., K] -> planes i64[.., words], padded with 0 after the end of a row."""
    padded = torch.nn.functional.pad(
        codes, (0, words(codes.shape[-1]) * NEIGHBOURS - codes.shape[-1])
    )
    groups = padded.reshape(*codes.shape[:-1], words(codes.shape[-1]), NEIGHBOURS).long()
    shifts = torch.arange(NEIGHBOURS)
    return ((groups & 1) << shifts | (groups >> 1) << shifts + NEIGHBOURS).sum(-1)


def decode(planes: Tensor, width: int) -> Tensor:
    """The codes u8[.., width]."""
    shifts = torch.arange(NEIGHBOURS)
    words = planes[..., None]
    codes = (words >> shifts & 1) | (words >> shifts + NEIGHBOURS & 1) << 1
    return codes.flatten(-2)[..., :width].to(torch.uint8)
