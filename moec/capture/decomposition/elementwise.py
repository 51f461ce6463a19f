"""Functions of single numbers without kernels, exact to some units in the last place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moec.capture.decomposition.pooling import widened

_LARGE = 1e8
"""Above it x + 1 is x in float32 and, by 1e-16 of x, in float64; its square is finite."""


def _signed(x: Tensor, magnitude: Tensor) -> Tensor:
    return copysign(magnitude, x).to(x.dtype)


def asinh(x: Tensor) -> Tensor:
    """asinh(a) = log1p(a + a^2 / (1 + sqrt(1 + a^2))), and log(2 a) where a is large."""
    a = widened(x.abs())
    b = a.clamp(max=_LARGE)
    near = torch.log1p(b + b * b / (1 + torch.sqrt(1 + b * b)))
    return _signed(x, torch.where(a > _LARGE, a.log() + math.log(2), near))


def acosh(x: Tensor) -> Tensor:
    """acosh(1 + t) = log1p(t + sqrt(2 t + t^2)), and log(2 x) where x is large; NaN below 1."""
    wide = widened(x)
    t = wide.clamp(max=_LARGE) - 1
    near = torch.log1p(t + torch.sqrt(2 * t + t * t))
    far = torch.where(wide > _LARGE, wide.log() + math.log(2), near)
    return far.masked_fill(wide < 1, math.nan).to(x.dtype)


def atanh(x: Tensor) -> Tensor:
    wide = widened(x)
    return ((torch.log1p(wide) - torch.log1p(-wide)) / 2).to(x.dtype)


def exp2(x: Tensor) -> Tensor:
    return torch.pow(2.0, widened(x)).to(x.dtype)


def hypot(x: Tensor, y: Tensor) -> Tensor:
    """sqrt(x^2 + y^2), whose squares may be too large or too small; infinite if one of them is."""
    wide = torch.promote_types(x.dtype, y.dtype)
    a, b = widened(x.to(wide).abs()), widened(y.to(wide).abs())
    most, least = torch.maximum(a, b), torch.minimum(a, b)
    ratio = torch.where(least == most, (most == most).to(most.dtype), least / most)
    length = most * torch.sqrt(1 + ratio * ratio)
    return torch.where(a.isinf() | b.isinf(), math.inf, length).to(wide)


def signbit(x: Tensor) -> Tensor:
    """Whether x is negative or -0."""
    return (x < 0) | ((x == 0) & (x.reciprocal() < 0)) if x.is_floating_point() else x < 0


def copysign(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(signbit(y), -x.abs(), x.abs())


def fmax(x: Tensor, y: Tensor) -> Tensor:
    """The greater one, or the other where one is NaN."""
    return torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.maximum(x, y)))


def fmin(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.minimum(x, y)))


ELEMENTWISE: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.acosh.default: acosh,
    torch.ops.aten.asinh.default: asinh,
    torch.ops.aten.atanh.default: atanh,
    torch.ops.aten.copysign.Tensor: copysign,
    torch.ops.aten.exp2.default: exp2,
    torch.ops.aten.fmax.default: fmax,
    torch.ops.aten.fmin.default: fmin,
    torch.ops.aten.hypot.default: hypot,
    torch.ops.aten.signbit.default: signbit,
}
