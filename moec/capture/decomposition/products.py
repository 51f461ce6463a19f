"""Transposed convolutions, products of two inputs and running sums, written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

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
