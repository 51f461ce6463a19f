"""What packed weights hold, read by the description of their layout (gemm/layout.py,
quantised/codes.py) and not by how they are packed: see `moec.codegen.module_builder.Param`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moec.codegen.cuda.gemm.product import GROUP
from moec.codegen.cuda.quantised.codes import STEP, WORDS, piece_of, place

Parts = Iterator[tuple[Tensor, Tensor]]


def interleaved(array: Tensor, *parts: Tensor) -> Parts:
    """Of gate and up [E, n, ...]."""
    for number, part in enumerate(parts):
        for stored, rows in zip(array, part, strict=True):
            yield _part(stored, number, len(parts)), rows


def transposed(array: Tensor, weight: Tensor) -> Parts:
    yield array, weight.mT


def widened(array: Tensor, weight: Tensor) -> Parts:
    yield array, weight.to(array.dtype)


def codes(bits: int, array: Tensor, *matrices: Tensor) -> Parts:
    """Of u8[E, n, k], a code in each."""
    k = torch.arange(piece_of(bits))
    index = [place(bits, n // STEP, n % STEP // 8, n % 2) for n in k.tolist()]
    word, shift = k % 8 // 2, torch.tensor(index) * bits
    for number, matrix in enumerate(matrices):
        for stored, rows in zip(array, matrix, strict=True):
            columns = _part(stored, number, len(matrices))
            pieces = columns.contiguous().view(torch.int32).view(len(rows), -1, WORDS)
            held = pieces[:, :, word] >> shift & 2**bits - 1
            yield held.to(torch.uint8).view(rows.shape), rows


def _part(stored: Tensor, number: int, of: int) -> Tensor:
    """The rows of gate or of up."""
    if of == 1:
        return stored
    groups = stored.reshape(-1, of, GROUP, *stored.shape[1:])
    return groups[:, number].flatten(0, 1)
