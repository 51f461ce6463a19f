"""Example inputs at other sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moec.ir.sizes.dims import Dim, evaluate_dim, symbols


def with_sizes(
    tensor: torch.Tensor, shape: Sequence[Dim], sizes: Mapping[str, int]
) -> torch.Tensor:
    """`tensor` repeated and cut so that its axes have the given sizes (`resize_axis`)."""
    for axis, dim in enumerate(shape):
        size = evaluate_dim(dim, sizes) if symbols(dim) <= set(sizes) else tensor.shape[axis]
        tensor = resize_axis(tensor, axis, size)
    return tensor


def resize_axis(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """`tensor` with an axis repeated or cut to a size. Of integers [.., S], the last one is
    repeated: a text keeps its number of image tokens. An axis of size 0 stays: there is nothing to
    repeat."""
    length = tensor.shape[axis]
    if size == length or not length:
        return tensor
    index = torch.arange(size, device=tensor.device)
    text = axis > 0 and axis == tensor.ndim - 1 and not tensor.is_floating_point()
    return tensor.index_select(axis, index.clamp(max=length - 1) if text else index % length)


def resized_axes(
    tensors: Sequence[torch.Tensor], axes: Sequence[tuple[int, int]], size: int
) -> list[torch.Tensor]:
    """The tensors, with each (tensor, axis) repeated or cut to one size."""
    result = list(tensors)
    for index, axis in axes:
        result[index] = resize_axis(result[index], axis, size)
    return result
