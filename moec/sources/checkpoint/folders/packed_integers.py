"""Integers of 2, 4 or 8 bits in words of 32 bits, lowest first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""AWQ puts column i of eight into the halves of bytes in this order, counted from the lowest."""


def unpack_last(words: Tensor, bits: int) -> Tensor:
    """words i32[.., W] -> integers u8[.., W * 32 / bits]."""
    bytes = words.contiguous().view(torch.uint8)  # little-endian, as the files are
    if bits == 8:
        return bytes
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (bytes[..., None] >> shifts & (1 << bits) - 1).flatten(-2)


def pack_last(integers: Tensor, bits: int) -> Tensor:
    """The inverse: integers u8[.., K] of 4 or 8 bits -> words i32[.., ceil(K * bits / 32)]."""
    each = 32 // bits
    padded = pad(integers, (0, -integers.shape[-1] % each))
    bytes = padded if bits == 8 else padded[..., ::2] | padded[..., 1::2] << 4
    return bytes.contiguous().view(torch.int32)


def unpack_first(words: Tensor, bits: int) -> Tensor:
    """words i32[W, N] -> integers u8[N, W * 32 / bits]."""
    return unpack_last(words.T, bits)


def unpack_awq(words: Tensor) -> Tensor:
    """words i32[R, W] -> integers of 4 bits, u8[R, W * 8], in the order of columns."""
    halves = unpack_last(words, 4)
    return halves.view(*words.shape, 8)[..., list(AWQ_ORDER)].flatten(-2)
