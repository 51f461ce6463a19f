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
from moec.capture.decomposition.elementwise import ELEMENTWISE
from moec.capture.decomposition.fourier import FOURIER
from moec.capture.decomposition.products import PRODUCTS


def cdist_forward(x: Tensor, y: Tensor, p: float, compute_mode: int | None) -> Tensor:
    """The distances [.., N, M] of rows x [.., N, D] and y [.., M, D] in the norm p."""
    difference = (x.unsqueeze(-2) - y.unsqueeze(-3)).abs()
    if p == 2:
        return difference.square().sum(-1).sqrt()
    if math.isinf(p):
        return difference.amax(-1)
    return (difference != 0).sum(-1).to(x.dtype) if p == 0 else difference.pow(p).sum(-1).pow(1 / p)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (1, -1, *[1] * (y.ndim - 2))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *statistics: Any) -> Any:
    """(x - mean) / sqrt(var + eps) * weight + bias along axis 1, and two empty tensors, which only
    gradients would need."""
    mean, var, _, eps = statistics
    shape = (1, -1, *[1] * (x.ndim - 2))
    y = (x - mean.view(shape)) * torch.rsqrt(var + eps).view(shape)
    return _affine(y, weight, bias).to(x.dtype), x.new_empty(0), x.new_empty(0)


def group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *sizes: Any) -> Any:
    """x [batch, channels, ..] normalised over each group of channels and all positions, and two
    empty tensors, which only gradients would need."""
    batch, channels, positions, groups, eps = sizes
    rows = pooling.widened(x).reshape(batch, groups, channels // groups, positions)
    var, mean = torch.var_mean(rows, (2, 3), correction=0, keepdim=True)
    y = ((rows - mean) * torch.rsqrt(var + eps)).reshape(x.shape)
    return _affine(y, weight, bias).to(x.dtype), x.new_empty(0), x.new_empty(0)


def embedding_bag(weight: Tensor, ids: Tensor, offsets: Tensor, *options: Any) -> Any:
    """Sums, means or maxima [B, D] of bags of rows, and three empty tensors for gradients."""
    defaults: Any = (False, 0, False, None, False, -1)
    _, mode, _, scales, closed, padding = options + defaults[len(options) :]
    starts = (offsets[:-1] if closed else offsets).long()
    begins = starts.new_zeros(ids.shape[0] + 1).index_add(0, starts, torch.ones_like(starts))
    bag, inside = begins.cumsum(0)[:-1] - 1, (ids != padding).unsqueeze(-1)
    rows = pooling.widened(torch.embedding(weight, ids))
    rows = rows if scales is None else rows * scales.unsqueeze(-1)
    y = rows.new_zeros(starts.shape[0], weight.shape[1])
    counts = y.new_zeros(starts.shape[0], 1).index_add(0, bag, inside.to(y.dtype))
    if mode == 2:
        maxima, rows = y - math.inf, rows.where(inside, -math.inf)
        maxima = maxima.scatter_reduce(0, bag.unsqueeze(-1).expand(rows.shape), rows, "amax")
        y = maxima.where(counts > 0, 0.0)
    else:
        y = y.index_add(0, bag, rows.where(inside, 0.0)) / (counts.clamp(min=1) if mode else 1)
    return y.to(weight.dtype), *[ids.new_empty(0) for _ in range(3)]


def kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, ...]:
    """The k-th smallest value of one axis, and its position or, as torch allows, that of a tie."""
    parts = (part.narrow(dim, k - 1, 1) for part in x.sort(dim))
    return tuple(part if keepdim else part.squeeze(dim) for part in parts)


def median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, ...]:
    """The lower median of one axis, or NaN where the axis has one, and its position."""
    size = x.shape[dim]
    middle, last = (kthvalue(x, k, dim, keepdim) for k in ((size + 1) // 2, size))
    return tuple(b.where(last[0].isnan(), a) for a, b in zip(middle, last, strict=True))


def searchsorted(edges: Tensor, x: Tensor, **options: Any) -> Tensor:
    """How many of the sorted edges [.., N] are below each of x [.., M], or of all x where edges has
    one axis. NaN is above all."""
    if (sorter := options.get("sorter")) is not None:
        edges = edges.gather(-1, sorter)
    right = options.get("right") or options.get("side") == "right"
    rows, columns = edges.unsqueeze(-2) if edges.ndim > 1 else edges, x.unsqueeze(-1)
    count = (~(rows > columns if right else rows >= columns)).sum(-1)
    return count.int() if options.get("out_int32") else count


WRITTEN_OUT: Mapping[Any, Callable[..., Any]] = {
    **ELEMENTWISE,
    **FOURIER,
    **PRODUCTS,
    torch_private.cdist_forward: cdist_forward,
    torch_private.batch_norm_no_training: batch_norm,
    torch_private.training_bag: embedding_bag,
    torch_private.embedding_bag: embedding_bag,
    torch_private.adaptive_avg_pool2d: pooling.adaptive_avg_pool2d,
    torch.ops.aten.adaptive_max_pool2d.default: pooling.adaptive_max_pool2d,
    torch.ops.aten.avg_pool2d.default: partial(pooling.avg_pool, axes=2),
    torch.ops.aten.avg_pool3d.default: partial(pooling.avg_pool, axes=3),
    torch.ops.aten.kthvalue.default: kthvalue,
    torch.ops.aten.median.dim: median,
    torch.ops.aten.searchsorted.Tensor: searchsorted,
    torch.ops.aten.max_pool2d_with_indices.default: pooling.max_pool2d,
    torch.ops.aten.native_group_norm.default: group_norm,
}
LEFT_OUT = (
    torch_private.instance_norm,
    torch.ops.aten.grid_sampler_2d.default,
    torch.ops.aten.ldexp.Tensor,
    torch.ops.aten.upsample_bilinear2d.vec,
    torch.ops.aten.upsample_bilinear2d.default,
    torch.ops.aten.upsample_nearest2d.vec,
)
"""Operators that torch has rules for, but not in its table for core ATen."""
