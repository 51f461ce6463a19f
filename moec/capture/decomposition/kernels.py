"""Operators of core ATen that moec has no kernels for, written out in others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moec import torch_private


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
    y = y if weight is None else y * weight.view(shape)
    y = y if bias is None else y + bias.view(shape)
    return y.to(x.dtype), x.new_empty(0), x.new_empty(0)


WRITTEN_OUT: Mapping[Any, Callable[..., Any]] = {
    torch_private.cdist_forward: cdist_forward,
    torch_private.batch_norm_no_training: batch_norm_no_training,
}
