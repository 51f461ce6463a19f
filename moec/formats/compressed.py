"""Compressed stacks of expert weights: the stored tensors of each kind, and their values.

ternary   stream i16[W], starts u8[E * N / 32, 36 or 68], grid bf16[E, N, 2] (least, greatest)
2bit      planes i64[E, N, K / 32], grid bf16[E, N, 2] (step, zero)
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from moec.formats import ternary, two_bit

KINDS = ("ternary", "2bit")
PARTS = {"ternary": ("stream", "starts", "grid"), "2bit": ("planes", "grid")}
"""The tensors of a compressed stack, the grid last."""
MOST_WIDTH = 65535
"""The most weights of a row: the sum of so many 16-bit integers fits 32 bits."""


def grid_module(kind: str) -> ModuleType:
    """The module with `grid_of`, `codes_of` and `values` of a kind."""
    return ternary if kind == "ternary" else two_bit


def compress(kind: str, codes: Tensor, grid: Tensor) -> tuple[Tensor, ...]:
    """The parts (see PARTS) of codes u8[E, N, K] and their grid. Raises ValueError for invalid
    codes."""
    if kind == "2bit":
        return two_bit.encode(codes), grid
    encoded = ternary.encode(codes.flatten(0, 1))
    return encoded.stream, encoded.starts, grid


def codes_in(kind: str, parts: Sequence[Tensor], width: int) -> Tensor:
    """The codes u8[E, N, width]. Raises ValueError for a stream that does not hold them."""
    *stored, grid = parts
    if kind == "2bit":
        return two_bit.decode(stored[0], width)
    stream, starts = stored
    rows = grid.shape[0] * grid.shape[1]
    codes = ternary.decode(ternary.Encoded(stream, starts), rows, width)
    return codes.view(*grid.shape[:2], width)


def decompress(kind: str, parts: Sequence[Tensor], width: int) -> Tensor:
    """The weights f32[E, N, width]. Raises ValueError for a stream that does not hold them."""
    return grid_module(kind).values(codes_in(kind, parts, width), parts[-1])  # type: ignore[no-any-return]


def nbytes(parts: Sequence[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in parts)
