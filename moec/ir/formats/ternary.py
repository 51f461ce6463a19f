"""Ternary weights: each is 0, its row's least or its row's greatest, in less than one bit.

A matrix of codes (0: zero, 1: least, 2: greatest) becomes a stream of 16-bit codewords, row after
row, the start of each row in the stream, and two bf16 numbers per row. A row of odd length is
padded with a 0. Codewords are greedy longest matches (ternary_code.py), found in two passes: their
number in each row, then the codewords. Greedy matching is optimal: every substring of a codeword is
at least as likely, and so a codeword itself.

    codes u8[R, K]  ->  stream i16[W] (the bits of uint16), starts u8[R / 32, 36 or 68]

A row of 768 weights takes about 71 bytes, so that a start of four bytes per row would cost much.
Only every 32nd row has one: a uint32, followed by the number of codewords of each of the 32 rows,
in one or two bytes. The numbers of missing rows are 0.

Source: QMoE, arXiv 2310.16795, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moec.ir.formats.ternary_code import dictionary

MOST_CODEWORDS = 2**31 - 1
TOGETHER = 32
"""The number of rows that share a start."""
START = 4  # bytes


@dataclass(frozen=True, eq=False)
class Encoded:
    """`stream` i16[W], `starts` u8[ceil(R / 32), 36 or 68]."""

    stream: Tensor
    starts: Tensor

    @property
    def nbytes(self) -> int:
        return 2 * self.stream.numel() + self.starts.numel()


def starts_shape(rows: int, bytes_of_count: int) -> tuple[int, int]:
    return -(-rows // TOGETHER), START + TOGETHER * bytes_of_count


def bytes_of_counts(starts: Sequence[int]) -> int:
    """The bytes per count, 1 or 2, in starts of that shape."""
    return (starts[1] - START) // TOGETHER


def pack_starts(starts: npt.NDArray[np.int64]) -> Tensor:
    """i64[R + 1], each row's start and the end -> u8 as above."""
    counts = np.diff(starts)
    kind = np.uint8 if counts.max(initial=0) < 256 else np.uint16
    shape = starts_shape(len(counts), np.dtype(kind).itemsize)
    padded = np.zeros(shape[0] * TOGETHER, kind)
    padded[: len(counts)] = counts
    first = starts[:-1:TOGETHER].astype(np.uint32).view(np.uint8).reshape(-1, START)
    behind = padded.view(np.uint8).reshape(-1, shape[1] - START)
    return torch.from_numpy(np.concatenate([first, behind], axis=1))


def unpack_starts(packed: Tensor, rows: int) -> npt.NDArray[np.int64]:
    """The inverse of `pack_starts`. Raises ValueError for another number of rows, and for starts
    that contradict the counts."""
    bytes_of_count = bytes_of_counts(packed.shape)
    if bytes_of_count not in (1, 2) or tuple(packed.shape) != starts_shape(rows, bytes_of_count):
        raise ValueError(f"starts u8{list(packed.shape)} are not those of {rows} rows")
    table = packed.contiguous().numpy()
    first = table[:, :START].copy().view(np.uint32).reshape(-1)
    counts = (
        table[:, START:].copy().view(np.uint8 if bytes_of_count == 1 else np.uint16).reshape(-1)
    )
    starts = np.zeros(rows + 1, np.int64)
    np.cumsum(counts[:rows], out=starts[1:])
    if counts[rows:].any() or (starts[:-1:TOGETHER] != first).any():
        raise ValueError("the starts of rows do not follow each other")
    return starts


def grid_of(weight: Tensor) -> Tensor:
    """The least and the greatest weight of each row of [.., N, K], at most and at least 0:
    bf16[.., N, 2]."""
    low, high = torch.aminmax(weight.detach().float(), dim=-1)
    return torch.stack([low.clamp(max=0), high.clamp(min=0)], -1).bfloat16()


def scale_grid(grid: Tensor, share: float) -> Tensor:
    """Both numbers times `share`, so that fewer weights are nearest to 0."""
    return (grid.float() * share).bfloat16()


def codes_of(weight: Tensor, grid: Tensor) -> Tensor:
    """u8[.., N, K]: 2 above half of the greatest, 1 below half of the least, 0 between.

    `grid` [.., N, 2] holds both for each row.
    """
    low, high = (half[..., None] for half in (grid.float() / 2).unbind(-1))
    return (2 * (weight > high).to(torch.uint8)) | (weight < low).to(torch.uint8)


def levels(grid: Tensor) -> Tensor:
    """f32[.., N, 3]: the value of each code, by row."""
    low, high = grid.float().unbind(-1)
    return torch.stack([torch.zeros_like(low), low, high], -1)


def values(codes: Tensor, grid: Tensor) -> Tensor:
    """f32[.., N, K]: the values of codes."""
    return levels(grid).gather(-1, codes.long())


def refit(weight: Tensor, codes: Tensor, grid: Tensor, hessian: Tensor) -> Tensor:
    """The two numbers of each row that bring the results of its codes closest to those of
    `weight` [.., N, K], by least squares under the inputs' Hessian [.., K, K]: bf16[.., N, 2].

    A number of `grid` stays where no code of its row uses it, where its inputs are all 0, and where
    it would change its sign.
    """
    signs = torch.stack([codes == 1, codes == 2], -3).float()  # [.., 2, N, K]
    products = signs @ hessian[..., None, :, :]
    normal = torch.einsum("...ank,...bnk->...nab", products, signs)
    targets = torch.einsum("...ank,...nk->...na", products, weight.float())
    unknown = normal.diagonal(dim1=-2, dim2=-1) <= 0
    fitted, info = torch.linalg.solve_ex(normal + torch.diag_embed(unknown.float()), targets)
    right = fitted * torch.tensor([-1.0, 1.0]) > 0
    solved = right & ~unknown & (info == 0)[..., None] & fitted.isfinite()
    return torch.where(solved, fitted, grid.float()).bfloat16()


def encode(codes: Tensor) -> Encoded:
    """Encode codes u8[R, K]. Raises ValueError for codes other than 0, 1 and 2."""
    if codes.dtype != torch.uint8 or codes.ndim != 2 or (codes.numel() and int(codes.max()) > 2):
        raise ValueError("ternary codes are u8[R, K] of 0, 1 and 2")
    from moec.ir.formats import ternary_loops

    children = dictionary().children
    rows = codes.contiguous().numpy()
    starts = np.zeros(len(rows) + 1, np.int64)
    ternary_loops.count(rows, children, starts[1:])
    np.cumsum(starts, out=starts)
    if starts[-1] > MOST_CODEWORDS:
        raise ValueError(f"{starts[-1]} codewords are more than row starts of 32 bits can tell")
    stream = np.empty(starts[-1], np.uint16)
    ternary_loops.write(rows, children, starts, stream)
    return Encoded(torch.from_numpy(stream.view(np.int16)), pack_starts(starts))


def decode(encoded: Encoded, rows: int, width: int) -> Tensor:
    """The codes u8[rows, width]. Raises ValueError where a row does not hold `width` weights."""
    from moec.ir.formats import ternary_loops

    starts = unpack_starts(encoded.starts, rows)
    if starts[-1] != encoded.stream.numel():
        raise ValueError(f"rows of {starts[-1]} codewords are not {encoded.stream.numel()}")
    codes = np.zeros((rows, width), np.uint8)
    complete = np.zeros(len(codes), np.bool_)
    ternary_loops.read(
        encoded.stream.numpy().view(np.uint16), starts, dictionary().entries, codes, complete
    )
    if not complete.all():
        raise ValueError(
            f"row {int(complete.argmin())} of the stream does not hold {width} weights"
        )
    return torch.from_numpy(codes)
