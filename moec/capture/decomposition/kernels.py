"""Operators of core ATen that moec has no kernels for, written out in others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moec import torch_private
from moec.capture.decomposition import pooling

_aten = torch.ops.aten


def cdist_forward(x: Tensor, y: Tensor, p: float, compute_mode: int | None) -> Tensor:
    """The distances [.., N, M] of rows x [.., N, D] and y [.., M, D] in the norm p."""
    difference = (x.unsqueeze(-2) - y.unsqueeze(-3)).abs()
    if p == 2:
        return difference.square().sum(-1).sqrt()
    if p == 1:
        return difference.sum(-1)
    if math.isinf(p):
        return difference.amax(-1)
    return (difference != 0).sum(-1).to(x.dtype) if p == 0 else difference.pow(p).sum(-1).pow(1 / p)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (1, -1, *[1] * (y.ndim - 2))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def batch_norm_no_training(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps) * weight + bias along axis 1, and two empty tensors, which only
    gradients would need."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    y = (x - mean.view(shape)) * torch.rsqrt(var + eps).view(shape)
    return _affine(y, weight, bias).to(x.dtype), x.new_empty(0), x.new_empty(0)


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *sizes: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """x [batch, channels, ..] normalised over each group of channels and all positions, and two
    empty tensors, which only gradients would need."""
    batch, channels, positions, groups, eps = sizes
    rows = pooling.widened(x).reshape(batch, groups, channels // groups, positions)
    var, mean = torch.var_mean(rows, (2, 3), correction=0, keepdim=True)
    y = ((rows - mean) * torch.rsqrt(var + eps)).reshape(x.shape)
    return _affine(y, weight, bias).to(x.dtype), x.new_empty(0), x.new_empty(0)


WRITTEN_OUT: Mapping[Any, Callable[..., Any]] = {
    torch_private.cdist_forward: cdist_forward,
    torch_private.batch_norm_no_training: batch_norm_no_training,
    torch_private.adaptive_avg_pool2d: pooling.adaptive_avg_pool2d,
    _aten.adaptive_max_pool2d.default: pooling.adaptive_max_pool2d,
    _aten.avg_pool2d.default: partial(pooling.avg_pool, axes=2),
    _aten.avg_pool3d.default: partial(pooling.avg_pool, axes=3),
    _aten.max_pool2d_with_indices.default: pooling.max_pool2d,
    _aten.native_group_norm.default: group_norm,
}
LEFT_OUT = (
    torch_private.batch_norm_no_stats,
    _aten.grid_sampler_2d.default,
    _aten.ldexp.Tensor,
    _aten.upsample_bilinear2d.vec,
    _aten.upsample_bilinear2d.default,
    _aten.upsample_nearest2d.vec,
)
"""Operators that torch has rules for, but not in its table for core ATen."""
