"""What packed weights hold, read by the description of their layout and not by how they are packed.

Each function yields, part by part, what an array holds and what the weights say that it should,
padding included (gemm/layout.py, quantised/layout.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.quantised import words
from moec.codegen.cpu.quantised.layout import QuantisedLayout

Parts = Iterator[tuple[Tensor, Tensor]]

_ELEMENTS = 1 << 22
"""About as many are in a part, so that no weight has a second copy in memory."""


def weights(layout: Layout, flipped: bool, array: Tensor, *matrices: Tensor) -> Parts:
    """Of [E, N, K] or [N, K], the last two axes swapped if `flipped`."""
    dtype = getattr(torch, layout.spec.dtype)
    for half, matrix in enumerate(matrices):
        for group, rows in zip(array, _groups(matrix.mT if flipped else matrix), strict=True):
            for first, columns in _columns(layout, group, half, layout.amx):
                yield _pair(columns.view(dtype), rows[first:])


def biases(layout: Layout, experts: Sequence[int], array: Tensor, *vectors: Tensor) -> Parts:
    """Of [E, N] or [N], all experts or those of `experts`."""
    for half, vector in enumerate(vectors):
        groups = vector.reshape(-1, layout.spec.n).float()
        groups = groups[list(experts)] if experts else groups
        for group, row in zip(array, groups, strict=True):
            for first, columns in _columns(layout, group[:, None], half):
                yield _pair(columns, row[first:, None])


def codes(layout: QuantisedLayout, array: Tensor, *matrices: Tensor) -> Parts:
    """Of u8[E, N, K] or [N, K], a code in each."""
    for half, matrix in enumerate(matrices):
        for group, rows in zip(array, _groups(matrix), strict=True):
            stored = _bytes_in_order(layout, group) if layout.floats else group
            for first, columns in _columns(layout, stored, half):
                yield _pair(words.codes(columns, layout.spec.format.bits), rows[first:])


def scales(layout: QuantisedLayout, marked: bool, array: Tensor, *matrices: Tensor) -> Parts:
    """Of [E, N, blocks] or [N, blocks], scales or zeros. With `marked`, codes of e4m3 follow, and
    the scale of a block with a NaN is NaN."""
    count = len(matrices) // 2 if marked else len(matrices)
    for half, matrix in enumerate(matrices[:count]):
        right = matrix
        if marked:
            of_blocks = matrices[count + half].reshape(*matrix.shape, -1)
            right = matrix.masked_fill(((of_blocks & 127) == 127).any(-1), torch.nan)
        for group, rows in zip(array, _groups(right), strict=True):
            for first, columns in _columns(layout, group, half):
                yield _pair(columns, rows[first:])


def _groups(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 3 else tensor[None]


def _columns(
    layout: Layout, group: Tensor, half: int, streams: bool = False
) -> Iterator[tuple[int, Tensor]]:
    """[columns of y, depth] of some tiles [tiles, depth, columns], and the first column's number.
    In `streams`, the vectors of a tile follow each other [vectors, depth, lanes]."""
    width, lanes = layout.width, layout.target.vector_lanes
    tiles = group.reshape(layout.tiles, -1, group.shape[-2], group.shape[-1])
    if streams:
        tiles = tiles[:, half * width // lanes : (half + 1) * width // lanes]
    else:
        tiles = tiles[..., half * width : (half + 1) * width]
    step = max(1, _ELEMENTS // max(1, width * group.shape[-2]))
    for tile in range(0, layout.tiles, step):
        columns = tiles[tile : tile + step].transpose(-1, -2)
        columns = columns.clone(memory_format=torch.contiguous_format)
        yield tile * width, columns.view(-1, group.shape[-2])


def _bytes_in_order(layout: QuantisedLayout, group: Tensor) -> Tensor:
    """Words of e4m3 with code j of column c of a vector of n in byte j of word c: it is stored in
    byte j / 2 of the 16-bit lane 2 c + j % 2, or c + n (j % 2)."""
    n = layout.target.vector_lanes
    column, code = torch.arange(n)[:, None], torch.arange(4)
    dot = layout.pairs and layout.target.bf16_dot
    lane = 2 * column + code % 2 if dot else column + n * (code % 2)
    byte = (2 * lane + code // 2).flatten()
    return group.view(torch.uint8).reshape(-1, 4 * n)[:, byte].view(torch.int32).view(group.shape)


def _pair(held: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`held`, and as many of the rows, with 0 where there is padding."""
    rows = rows[: len(held)]
    missing = (0, held.shape[1] - rows.shape[1], 0, len(held) - len(rows))
    return held, torch.nn.functional.pad(rows, missing) if any(missing) else rows
