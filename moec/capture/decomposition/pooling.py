"""Pooling, one axis after another: the maximum or sum of a window is that of its rows'."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def widened(x: Tensor) -> Tensor:
    """x in the dtype in which eager accumulates: float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _each(axes: int, *arguments: Sequence[int]) -> list[list[int]]:
    return [list(values) * (axes // len(values)) for values in arguments]


def _windows(
    x: Tensor, axis: int, window: Sequence[int], ceil_mode: bool, outside: float
) -> Tensor:
    """The windows of one axis of x, their elements along a new last axis; `window` is (kernel,
    stride, padding, dilation). By `ceil_mode` the last window may end beyond the padding."""
    kernel, stride, padding, dilation = window
    size, reach, more = x.shape[axis], dilation * (kernel - 1) + 1, ceil_mode * (stride - 1)
    count = (size + 2 * padding + more - reach) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1  # the last window would start beyond x
    if padding or more:
        x = pad(x, (0, 0) * (-1 - axis) + (padding, padding + more), value=outside)
    # not by slices, whose sizes torch.export does not derive from symbolic ones
    windows = x.unfold(axis, reach, stride)[..., ::dilation]
    return windows.narrow(axis - 1, 0, count) if more else windows


def max_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """The maxima of the windows, and their positions by an operator that has no kernel either:
    where nothing reads them it is left out, and elsewhere refused."""
    windows = _each(2, kernel_size, stride or kernel_size, padding, dilation)
    flat = [[n, *values] for n, values in zip((1, 1, 0, 1), windows, strict=True)]
    _, positions = torch.ops.aten.max_pool3d_with_indices(x.unsqueeze(-3), *flat, ceil_mode)
    outside = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    for axis, *window in zip((-2, -1), *windows, strict=True):
        x = _windows(x, axis, window, ceil_mode, outside).amax(-1)
    return x, positions.squeeze(-3)


def avg_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    axes: int,
) -> Any:
    """The averages of windows over the last `axes` axes of x, in float32 or wider. Without
    `count_include_pad`, a window is divided by the elements of x in it."""
    if not x.is_floating_point():
        return NotImplemented
    windows = _each(axes, kernel_size, stride or kernel_size, padding)
    varies = divisor_override is None and (ceil_mode or not count_include_pad)
    y = widened(x)
    for axis, k, s, p in zip(range(-axes, 0), *windows, strict=True):
        y = _windows(y, axis, (k, s, p, 1), ceil_mode, 0.0).sum(-1)
        if varies:
            beyond = p if count_include_pad else 0
            start = torch.arange(y.shape[axis], device=x.device) * s - p
            end = (start + k).clamp(max=x.shape[axis] + beyond)
            elements = (end - start.clamp(min=-beyond)).clamp(min=1)
            y = y / elements.view(-1, *[1] * (-1 - axis))
    return (y if varies else y / (divisor_override or math.prod(windows[0]))).to(x.dtype)


def adaptive_avg_pool2d(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """The averages of windows of almost equal sizes. No branch depends on the sizes of x."""
    y = widened(x)
    for axis, count in zip((-2, -1), output_size, strict=True):
        size, window = x.shape[axis], torch.arange(count, device=x.device).unsqueeze(-1)
        start, end = window * size // count, ((window + 1) * size + count - 1) // count
        position = torch.arange(size, device=x.device)
        inside = (position >= start) & (position < end)
        rows = y.movedim(axis, -1).unsqueeze(-2)
        y = (rows.where(inside, 0.0).sum(-1) / inside.sum(-1)).movedim(-1, axis)
    return y.to(x.dtype)


def adaptive_max_pool2d(x: Tensor, output_size: Sequence[int]) -> Any:
    """The maximum of each image, and its position."""
    if any(count != 1 for count in output_size):
        return NotImplemented
    return x.amax((-2, -1), keepdim=True), x.flatten(-2).argmax(-1)[..., None, None]
