"""Discrete Fourier transforms as products with the matrix of roots of unity, an axis at a time.

X_k = scale * sum_n x_n exp(-2 pi i k n / N). It takes N^2 steps, and is meant for the short axes of
layers that mix tokens or features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moec import torch_private

_NONE, _BY_ROOT, _BY_SIZE = range(3)
MOST = 2048
"""The longest axis of a known size: torch's operator stays, and is refused, where one is longer."""


def _roots(rows: Any, columns: Any, size: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi k n / size for k < rows and n < columns: [rows, columns] each. Products
    are reduced to one turn as integers, so that no angle loses digits."""
    k, n = (torch.arange(count, device=like.device) for count in (rows, columns))
    turn = (k[:, None] * n).remainder(size).to(torch.float64) * (2 * math.pi / size)
    return turn.cos().to(like.dtype), turn.sin().to(like.dtype)


def _scale(y: Tensor, sizes: Sequence[Any], normalization: int) -> Tensor:
    if normalization == _NONE:
        return y
    count = math.prod(sizes)
    result: Tensor = y / (count if normalization == _BY_SIZE else count**0.5)
    return result


def _parts_of_axis(re: Tensor, im: Tensor | None, axis: int, forward: bool, rows: Any) -> Any:
    """Real and imaginary part of the first `rows` frequencies of one axis."""
    size = re.shape[axis]
    cos, sin = _roots(rows, size, size, re)
    sin = -sin if forward else sin
    re = re.movedim(axis, -1)
    if im is None:
        parts = re @ cos.mT, re @ sin.mT
    else:
        im = im.movedim(axis, -1)
        parts = re @ cos.mT - im @ sin.mT, re @ sin.mT + im @ cos.mT
    return tuple(part.movedim(-1, axis) for part in parts)


def _too_long(x: Tensor, axes: Sequence[int]) -> bool:
    return any(isinstance(x.shape[axis], int) and x.shape[axis] > MOST for axis in axes)


def of_real(x: Tensor, axes: Sequence[int], normalization: int, onesided: bool) -> Any:
    """Complex frequencies of real x; with `onesided` the last axis has those up to half of it."""
    if _too_long(x, axes):
        return NotImplemented
    *others, last = axes
    size = x.shape[last]
    re, im = _parts_of_axis(x, None, last, True, size // 2 + 1 if onesided else size)
    for axis in others:
        re, im = _parts_of_axis(re, im, axis, True, re.shape[axis])
    sizes = [x.shape[axis] for axis in axes]
    return torch.complex(_scale(re, sizes, normalization), _scale(im, sizes, normalization))


def of_complex(x: Tensor, axes: Sequence[int], normalization: int, forward: bool) -> Any:
    if _too_long(x, axes):
        return NotImplemented
    re, im = x.real, x.imag
    for axis in axes:
        re, im = _parts_of_axis(re, im, axis, forward, re.shape[axis])
    sizes = [x.shape[axis] for axis in axes]
    return torch.complex(_scale(re, sizes, normalization), _scale(im, sizes, normalization))


def to_real(x: Tensor, axes: Sequence[int], normalization: int, size: Any) -> Any:
    """Real values, `size` of them on the last of the axes, of frequencies up to half of it: those
    between count for their conjugates, too."""
    if _too_long(x, axes) or (isinstance(size, int) and size > MOST):
        return NotImplemented
    *others, last = axes
    sizes = [*(x.shape[axis] for axis in others), size]
    re, im = x.real, x.imag
    for axis in others:
        re, im = _parts_of_axis(re, im, axis, False, re.shape[axis])
    re, im = (part.movedim(last, -1)[..., : size // 2 + 1] for part in (re, im))
    frequency = torch.arange(size // 2 + 1, device=x.device)
    alone = (frequency == 0) | (2 * frequency == size)
    counted = torch.where(alone, 1.0, 2.0).to(re.dtype)
    cos, sin = _roots(size, size // 2 + 1, size, re)
    y = (re * counted) @ cos.mT - (im * counted) @ sin.mT
    return _scale(y.movedim(-1, last), sizes, normalization)


FOURIER: Mapping[Any, Callable[..., Any]] = {
    torch_private.fft_of_real: of_real,
    torch_private.fft_of_complex: of_complex,
    torch_private.fft_to_real: to_real,
}
