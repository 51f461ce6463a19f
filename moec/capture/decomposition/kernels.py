"""Operators of core ATen that moec has no kernels for, written out in others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moec import torch_private
from moec.capture.decomposition import pooling
from moec.capture.decomposition.pooling import widened

# Discrete Fourier transforms as products with the matrix of roots of unity, an axis at a time.
#
# X_k = scale * sum_n x_n exp(-2 pi i k n / N). It takes N^2 steps, and is meant for the short axes
# of layers that mix tokens or features.

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


_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
    dilation: Sequence[int] = (1,),
) -> Tensor:
    """x [batch, C, ..] by weight [C, out / groups, ..]: the convolution of x, with stride - 1 zeros
    after each element, with the flipped weight."""
    axes = weight.ndim - 2
    batched = x if x.ndim == weight.ndim else x[None]
    sizes = zip(
        *(list(v) * (axes // len(v)) for v in (stride, padding, output_padding, dilation)),
        weight.shape[2:],
        strict=True,
    )
    margins: list[int] = []
    for axis, (step, left_out, more, spread, kernel) in enumerate(sizes, 2):
        count = batched.shape[axis]
        if step > 1:
            holes = pad(batched.unsqueeze(axis + 1), (0, 0) * (axes + 1 - axis) + (0, step - 1))
            batched = holes.flatten(axis, axis + 1).narrow(axis, 0, (count - 1) * step + 1)
        reach = spread * (kernel - 1) - left_out
        margins = [reach, reach + more, *margins]
    channels, each = weight.shape[:2]
    grouped = weight.reshape(groups, channels // groups, each, *weight.shape[2:]).transpose(1, 2)
    flipped = grouped.reshape(groups * each, channels // groups, *weight.shape[2:])
    flipped = flipped.flip(tuple(range(2, weight.ndim)))
    options: Any = {"dilation": list(dilation) * (axes // len(dilation)), "groups": groups}
    y: Tensor = _CONVOLUTIONS[axes - 1](pad(batched, margins), flipped, bias, **options)
    return y if x.ndim == weight.ndim else y[0]


def bilinear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [.., I], y [.., J], weight [O, I, J] -> [.., O]: x weight_o y of each o."""
    outputs, rows, columns = weight.shape
    product = x @ weight.permute(1, 0, 2).reshape(rows, outputs * columns)
    product = product.reshape(*x.shape[:-1], outputs, columns)
    result: Tensor = (product @ y.unsqueeze(-1)).squeeze(-1)
    return result if bias is None else result + bias


def logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """log of the sums of exp(x) up to each element of one axis, by the maximum of each prefix."""
    if not x.ndim:
        return x.clone()
    rows = x.movedim(dim, -1)
    position = torch.arange(rows.shape[-1], device=x.device)
    prefix = rows.unsqueeze(-2).masked_fill(position > position[:, None], -math.inf)
    return prefix.logsumexp(-1).movedim(-1, dim)


def addmv(x: Tensor, matrix: Tensor, vector: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    product: Tensor = alpha * (matrix @ vector)
    return product.expand(matrix.shape[:1]) if beta == 0 else beta * x + product


PRODUCTS: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.addmv.default: addmv,
    torch.ops.aten.bilinear.default: bilinear,
    torch.ops.aten.conv_transpose1d.default: conv_transpose,
    torch.ops.aten.conv_transpose2d.input: conv_transpose,
    torch.ops.aten.conv_transpose3d.input: conv_transpose,
    torch.ops.aten.logcumsumexp.default: logcumsumexp,
}


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


def take_along_dim(input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """torch's broadcasts the operands to the sizes of the example."""
    if dim is None:
        return input.reshape(-1).gather(0, indices.reshape(-1))
    dim %= input.ndim
    before, after = (
        torch.broadcast_shapes(input.shape[part], indices.shape[part])  # type: ignore[no-untyped-call]
        for part in (slice(dim), slice(dim + 1, None))
    )
    size, count = input.shape[dim], indices.shape[dim]
    rows = indices.expand(*before, count, *after).remainder(size)
    return input.expand(*before, size, *after).gather(dim, rows)


def scatter_reduce(x: Tensor, dim: int, index: Tensor, src: Any, how: str, **options: Any) -> Any:
    """Means are sums over counts. Without x, what is written to begins at what changes nothing."""
    include_self = options.get("include_self", True)
    if include_self and how != "mean":
        return NotImplemented
    if not include_self:
        x = x.scatter(dim, index, src if how in ("amax", "amin") else int(how == "prod"))
    if how != "mean":
        return x.scatter_reduce(dim, index, src, how)
    counts = torch.full_like(x, include_self).scatter_add(dim, index, torch.ones_like(src))
    rounding = None if x.is_floating_point() else "floor"
    return torch.div(x.scatter_add(dim, index, src), counts.clamp(min=1), rounding_mode=rounding)


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
    torch.ops.aten.take_along_dim.default: take_along_dim,
    torch.ops.aten.scatter_reduce.two: scatter_reduce,
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
