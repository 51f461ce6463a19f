"""Stacks of ternary expert weights: their stored tensors, and their values.

stream i16[W], starts u8[E * N / 32, 36 or 68], grid bf16[E, N, 2] (least, greatest)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moec.ir.formats import ternary

KIND = "ternary"
"""The one kind, which ops of compressed weights name."""
PARTS = ("stream", "starts", "grid")
"""The tensors of a compressed stack, the grid last."""
MOST_WIDTH = 65535
"""The most weights of a row: the sum of so many 16-bit integers fits 32 bits."""


def compress(codes: Tensor, grid: Tensor) -> tuple[Tensor, ...]:
    """The parts (see PARTS) of codes u8[E, N, K] and their grid. Raises ValueError for invalid
    codes."""
    encoded = ternary.encode(codes.flatten(0, 1))
    return encoded.stream, encoded.starts, grid


def codes_in(parts: Sequence[Tensor], width: int) -> Tensor:
    """The codes u8[E, N, width]. Raises ValueError for a stream that does not hold them."""
    stream, starts, grid = parts
    rows = grid.shape[0] * grid.shape[1]
    codes = ternary.decode(ternary.Encoded(stream, starts), rows, width)
    return codes.view(*grid.shape[:2], width)


def decompress(parts: Sequence[Tensor], width: int) -> Tensor:
    """The weights f32[E, N, width]. Raises ValueError for a stream that does not hold them."""
    return ternary.values(codes_in(parts, width), parts[-1])


def nbytes(parts: Sequence[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in parts)
