"""Example inputs at other sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moec.ir.dims import Dim, evaluate_dim, symbols


def with_sizes(
    tensor: torch.Tensor, shape: Sequence[Dim], sizes: Mapping[str, int]
) -> torch.Tensor:
    """`tensor` repeated and cut so that its named axes have the given sizes. An axis of size 0
    stays: there is nothing to repeat."""
    for axis, dim in enumerate(shape):
        size = evaluate_dim(dim, sizes) if symbols(dim) <= set(sizes) else tensor.shape[axis]
        if size != tensor.shape[axis] and tensor.shape[axis]:
            index = torch.arange(size) % tensor.shape[axis]
            tensor = tensor.index_select(axis, index)
    return tensor


def resized_axes(
    tensors: Sequence[torch.Tensor], axes: Sequence[tuple[int, int]], size: int
) -> list[torch.Tensor]:
    """The tensors, with each (tensor, axis) repeated or cut to one size."""
    result = list(tensors)
    for index, axis in axes:
        tensor = result[index]
        if tensor.shape[axis]:
            source = torch.arange(size) % tensor.shape[axis]
            result[index] = tensor.index_select(axis, source)
    return result
