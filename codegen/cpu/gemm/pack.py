"""Packs weights into the layout that kernels stream (see layout.py).

Packing is one strided copy by torch, on all its threads, from any source (a parameter, a
memory-mapped file, a transposed or interleaved view) to the final position. Padding is 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moec.codegen.cpu.gemm.layout import Layout

Array = npt.NDArray[np.generic]


def pack(layout: Layout, weight: Tensor | Array, up: Tensor | Array | None = None) -> Array:
    """weight [E, N, K] ([N, K] for one group), any strides -> an array of `layout.shape`.

    For a gated layout `weight` is the gate and `up` the other factor. bfloat16 arrays of numpy
    may come as ml_dtypes.bfloat16 or as 16-bit integers. ValueError where shapes or types are
    not those of `layout.spec`.
    """
    packed = _empty(layout)
    for half, part in enumerate(_as_tensor(layout, w) for w in _parts(layout, weight, up)):
        for start, to in _places(layout, packed, half):
            for target, source in _copies(to, part, start, layout):
                target.copy_(source)
    return (packed.view(torch.int32).squeeze(-1) if layout.pairs else packed).numpy()


def _empty(layout: Layout) -> Tensor:
    """Memory for packed weights, with zeros where there is padding."""
    padded = layout.tiles * layout.width != layout.spec.n or (
        layout.pairs and layout.spec.k % 2 == 1
    )
    elements = (*layout.shape, 2) if layout.pairs else layout.shape
    dtype = getattr(torch, layout.spec.dtype)
    return torch.zeros(elements, dtype=dtype) if padded else torch.empty(elements, dtype=dtype)


def pack_bias(layout: Layout, bias: Tensor | Array, up: Tensor | Array | None = None) -> Array:
    """bias [E, N] ([N] for one group) -> float32 of `layout.bias_shape`."""
    spec = layout.spec
    packed = torch.zeros(layout.bias_shape, dtype=torch.float32)
    for half, part in enumerate(_parts(layout, bias, up)):
        tensor = _from_numpy(part, spec.dtype).reshape(spec.groups, -1).float()
        if tensor.shape[1] != spec.n:
            raise ValueError(f"the bias is {list(part.shape)}, but y is {spec.n} wide")
        rows = torch.nn.functional.pad(tensor, (0, layout.tiles * layout.width - spec.n))
        rows = rows.view(spec.groups, layout.tiles, layout.width)
        packed[:, :, half * layout.width : (half + 1) * layout.width] = rows
    return packed.numpy()


def _parts(
    layout: Layout, first: Tensor | Array, up: Tensor | Array | None
) -> list[Tensor | Array]:
    if layout.spec.gated != (up is not None):
        raise ValueError("a gated layout takes gate and up, any other takes one array")
    return [first] if up is None else [first, up]


def _from_numpy(array: Tensor | Array, dtype: str) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    if dtype == "bfloat16" and array.dtype.itemsize == 2 and array.dtype != np.float16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _as_tensor(layout: Layout, array: Tensor | Array) -> Tensor:
    """The array as [E, N, K] of the spec's type."""
    spec = layout.spec
    tensor = _from_numpy(array, spec.dtype)
    if tensor.ndim == 2:
        tensor = tensor.unsqueeze(0)
    shape = (spec.groups, spec.n, spec.k)
    if tuple(tensor.shape) != shape or tensor.dtype != getattr(torch, spec.dtype):
        raise ValueError(
            f"the weight is {tensor.dtype} {list(array.shape)}, "
            f"but the kernel takes torch.{spec.dtype} {list(shape)}"
        )
    return tensor


def _places(layout: Layout, packed: Tensor, half: int) -> list[tuple[int, Tensor]]:
    """The parts of `packed` that hold one half, [E, tiles, depth, columns(, 2)], each with its
    first column within a tile."""
    if not layout.amx:
        return [(0, packed[:, :, :, half * layout.width : (half + 1) * layout.width])]
    lanes = layout.target.vector_lanes
    each = layout.width // lanes
    streams = packed.view(packed.shape[0], layout.tiles, layout.vectors, *packed.shape[2:])
    return [(j * lanes, streams[:, :, half * each + j]) for j in range(each)]


def _copies(
    to: Tensor, weight: Tensor, start: int, layout: Layout
) -> Iterator[tuple[Tensor, Tensor]]:
    """to [E, tiles, depth, columns(, 2)] <- weight [E, N, K], `columns` of N from `start` on in
    every `layout.width`."""
    columns, width = to.shape[3], layout.width
    present = layout.spec.n - start
    full_tiles = max(0, (present - columns) // width + 1)
    left = max(0, present - full_tiles * width)
    pairs = []  # of a part of `to` and its rows [E, tiles, columns, K]
    if full_tiles:
        pairs.append((to[:, :full_tiles], weight[:, start:].unfold(1, columns, width).mT))
    if left:
        pairs.append(
            (to[:, full_tiles:, :, :left], weight[:, start + full_tiles * width :].unsqueeze(1))
        )
    for target, rows in pairs:
        if rows.numel() == 0:
            continue
        if not layout.pairs:
            yield target, rows.transpose(2, 3)
        elif _viewable(rows):
            yield target.view(torch.int32).squeeze(-1), rows.view(torch.int32).transpose(2, 3)
        else:
            for parity in range(2):
                half_rows = rows[..., parity::2]
                filled = target[:, :, : half_rows.shape[-1], :, parity]
                yield filled, half_rows.transpose(2, 3)


def _viewable(rows: Tensor) -> bool:
    """Whether pairs of elements are aligned 32-bit words in memory."""
    return (
        rows.stride(-1) == 1
        and rows.shape[-1] % 2 == 0
        and all(s % 2 == 0 for s in rows.stride()[:-1])
        and rows.storage_offset() % 2 == 0
        and rows.data_ptr() % 4 == 0
    )
