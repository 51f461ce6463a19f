"""How far an element may be off that a kernel computes, and a common factor of many."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

ROUNDING = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 2.0**-24, "f64": 2.0**-53}
"""The greatest relative error of one rounding."""
SIGMAS = 6.0
"""An error that is a sum of roundings is within this many standard deviations."""
_SLOPE = 1 << 14
"""Elements by which a common factor of all is found."""
_LEAST_COLUMN = 16
"""Rows of an expert by which a factor of a column is found."""
LEAST_ROW = 64
"""Elements by which the noise of a row is known."""
_LARGE = 1e30
"""Bounds of 16 bits are computed in float32, where values are less than this."""


@dataclass(frozen=True)
class Bound:
    """How far elements of `dtype` may be off; `inner` is the size of roundings before the last, and
    `codes` that of codes of rows, relative to a row."""

    dtype: str
    inner: float
    codes: float = 0.0

    def errors(
        self, actual: torch.Tensor, exact: torch.Tensor, noisy: torch.Tensor
    ) -> torch.Tensor:
        """The errors of all elements relative to their bounds; inf where NaNs, infinities or
        integers differ."""
        if actual.is_complex():
            pair = torch.view_as_real(exact), torch.view_as_real(noisy)
            return Bound("f32", self.inner).errors(torch.view_as_real(actual), *pair)
        if not actual.is_floating_point():
            return torch.where(actual == exact, 0.0, 2.0)
        if actual.dtype.itemsize > 2 or not (exact.abs() < _LARGE).all():
            exact, noisy = exact.double(), noisy.double()
        rounded = exact.to(actual.dtype)
        finite = all(math.isfinite(float(tensor.sum())) for tensor in (rounded, noisy))
        if not finite:
            special = ~(rounded.isfinite() & exact.isfinite())
            equal = (actual == rounded) | (actual.isnan() & rounded.isnan())
            noisy = torch.where(special | ~noisy.isfinite(), exact, noisy)
            exact, noisy = (torch.where(special, 0.0, tensor) for tensor in (exact, noisy))
        size, deviation = exact.abs(), (noisy - exact).abs_()
        spread = torch.maximum(deviation, _row_noise(deviation)).maximum(self.inner * size)
        spread = spread.maximum(self.codes * _row_noise(size)) if self.codes else spread
        least = float(torch.finfo(actual.dtype).smallest_normal)
        bound = spread.mul_(SIGMAS).add_(size, alpha=ROUNDING[self.dtype]).add_(least)
        error = (actual.to(exact.dtype) - exact).abs_().div_(bound)
        if not finite:
            error = torch.where(special, torch.where(equal, 0.0, math.inf), error)
        return error.nan_to_num_(math.inf, math.inf)

    def slope(
        self, actual: torch.Tensor, exact: torch.Tensor, noisy: torch.Tensor
    ) -> tuple[float, float]:
        """By which share all elements, or all of a column, are too large, and how much of that
        roundings explain. Each rounds to either side; where few factors meet few values, not
        equally often."""
        a, b, c = (tensor.reshape(-1)[:_SLOPE, None].double() for tensor in (actual, exact, noisy))
        finite = (a.isfinite() & b.isfinite() & c.isfinite())[:, 0]
        a, b, c = a[finite], b[finite], c[finite]
        if len(b) < LEAST_ROW or not b.any():
            return 0.0, 1.0
        slopes = [self._slopes(a, b, c)]
        if exact.ndim == 2 and len(exact) >= _LEAST_COLUMN and finite.all():
            wide = exact.dtype if actual.dtype.itemsize <= 2 else torch.float64
            slopes.append(self._slopes(actual.to(wide), exact.to(wide), noisy.to(wide)))
        off, spread = (torch.cat(parts).double() for parts in zip(*slopes, strict=True))
        least = max(ROUNDING[self.dtype] / 2, min(4 * self.inner, 2.0**-9), 16 * self.codes)
        allowed = (SIGMAS * spread + least).nan_to_num(1.0)
        if bool((off.abs() > allowed).any()):
            alike = len(b) / len(torch.unique(b))
            allowed = (SIGMAS * spread * math.sqrt(alike) + least).nan_to_num(1.0)
        worst = int((off.abs() / allowed).argmax())
        return float(off[worst]), float(allowed[worst])

    def _slopes(
        self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The share of each column, and its standard deviation."""
        squares = b.square().sum(0)
        errors = (c - b).square() + (ROUNDING[self.dtype] * b).square() / 3
        errors = errors + (self.codes * b).square().mean(-1, keepdim=True)
        spread = (errors * b.square()).sum(0).sqrt() / squares
        return ((a * b).sum(0) / squares - 1).nan_to_num(), spread


def _row_noise(deviation: torch.Tensor) -> torch.Tensor:
    """The root mean square of each row's, or of some rows' where they are short."""
    axes = [deviation.ndim - 1] if deviation.ndim else []
    while axes and axes[0] and math.prod(deviation.shape[a] for a in axes) < LEAST_ROW:
        axes.insert(0, axes[0] - 1)
    if not axes or not deviation.numel():
        return deviation
    count = math.prod(deviation.shape[a] for a in axes)
    norm: torch.Tensor
    norm = torch.linalg.vector_norm(deviation, dim=axes, keepdim=True, dtype=torch.float64)
    return (norm / math.sqrt(count)).to(deviation.dtype)
