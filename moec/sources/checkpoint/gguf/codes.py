"""The quantised types of GGUF that moec stores as they are: their blocks as codes and scales.

A scale and a zero of a K type are the products of a float16 for 256 weights and of a few bits for
16 or 32; they are rounded to float16 here, by at most 2^-11. All other numbers are those of the
file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moec.errors import CaptureError
from moec.ir.formats.integer import Quantised
from moec.ir.formats.notation import Format


class StoredType(NamedTuple):
    """The format of a type, and its blocks u8[.., B, bytes] as codes u8[.., B, n] of the n weights
    of a block, and scales and zeros [.., B, m] of its m parts."""

    format: Format
    read: Callable[[Tensor], Quantised]


def read(kind: str, rows: Tensor) -> Quantised:
    """Codes u8[.., K], scales and zeros [.., K / block of the format] of the blocks
    u8[.., B, bytes] of rows of a type of STORED.

    Raises CaptureError for a scale that float16 does not hold."""
    stored = STORED[kind].read(rows)
    zeros = None if stored.zeros is None else stored.zeros.flatten(-2)
    return Quantised(stored.codes.flatten(-2), stored.scales.flatten(-2), zeros)


def _float(rows: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block, [.., B, 1]."""
    return rows[..., at : at + 2].contiguous().view(torch.float16)


def _product(scale: Tensor, few: Tensor) -> Tensor:
    exact = scale.float() * few.float()
    rounded = exact.half()
    if bool((rounded.isinf() & exact.isfinite()).any()):
        raise CaptureError(
            "a scale of the file is beyond float16, so that its weights are too: it is damaged"
        )
    return rounded


def _bits(data: Tensor, size: int, width: int, bits: int) -> Tensor:
    """Groups of `bits` bits of data u8[.., n * width]: for each `width` bytes first the lowest
    groups of all, then the next ones; the first `size` bits of each byte are read."""
    shifts = torch.arange(0, size, bits, dtype=torch.uint8)[:, None]
    split = data.reshape(*data.shape[:-1], -1, 1, width) >> shifts
    groups: Tensor = (split & 2**bits - 1).flatten(-3)
    return groups


def _fifth_bits(data: Tensor) -> Tensor:
    """Bit i of 32 bits, times 16, for weight i."""
    return (data[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2) << 4


def _q8_0(rows: Tensor) -> Quantised:
    return Quantised(rows[..., 2:] ^ 128, _float(rows, 0), None)


def _q4(rows: Tensor) -> Quantised:
    return Quantised(_bits(rows[..., 2:], 8, 16, 4), _float(rows, 0), None)


def _q4_1(rows: Tensor) -> Quantised:
    return Quantised(_bits(rows[..., 4:], 8, 16, 4), _float(rows, 0), -_float(rows, 2))


def _q5(rows: Tensor) -> Quantised:
    codes = _bits(rows[..., 6:], 8, 16, 4) | _fifth_bits(rows[..., 2:6])
    return Quantised(codes, _float(rows, 0), None)


def _q5_1(rows: Tensor) -> Quantised:
    codes = _bits(rows[..., 8:], 8, 16, 4) | _fifth_bits(rows[..., 4:8])
    return Quantised(codes, _float(rows, 0), -_float(rows, 2))


def _mxfp4(rows: Tensor) -> Quantised:
    return Quantised(_bits(rows[..., 1:], 8, 16, 4), rows[..., :1].contiguous(), None)


def _six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight zeros of 6 bits in 12 bytes: the last four of each have their lower
    bits in the last four bytes, and the upper ones beside the first four."""
    scales, zeros, both = data[..., :4], data[..., 4:8], data[..., 8:]
    return (
        torch.cat((scales & 63, both & 15 | scales >> 6 << 4), -1),
        torch.cat((zeros & 63, both >> 4 | zeros >> 6 << 4), -1),
    )


def _with_six_bits(rows: Tensor, codes: Tensor) -> Quantised:
    scales, zeros = _six_bits(rows[..., 4:16])
    return Quantised(codes, _product(_float(rows, 0), scales), _product(_float(rows, 2), zeros))


def _q4_k(rows: Tensor) -> Quantised:
    return _with_six_bits(rows, _bits(rows[..., 16:], 8, 32, 4))


def _q5_k(rows: Tensor) -> Quantised:
    upper = _bits(rows[..., 16:48], 8, 32, 1) << 4
    return _with_six_bits(rows, _bits(rows[..., 48:], 8, 32, 4) | upper)


def _q6_k(rows: Tensor) -> Quantised:
    codes = _bits(rows[..., :128], 8, 64, 4) | _bits(rows[..., 128:192], 8, 32, 2) << 4
    scales = rows[..., 192:208].contiguous().view(torch.int8)
    return Quantised(codes, _product(_float(rows, 208), scales), None)


def _q2_k(rows: Tensor) -> Quantised:
    few = rows[..., :16]
    scales, zeros = _product(_float(rows, 80), few & 15), _product(_float(rows, 82), few >> 4)
    return Quantised(_bits(rows[..., 16:80], 8, 32, 2), scales, zeros)


def _q3_k(rows: Tensor) -> Quantised:
    """Codes of three bits, 0 to 7 for -4 to 3, as those of four bits."""
    codes = _bits(rows[..., 32:96], 8, 32, 2) | _bits(rows[..., :32], 8, 32, 1) << 2
    few = _bits(rows[..., 96:104], 8, 8, 4) | _bits(rows[..., 104:108], 8, 4, 2) << 4
    return Quantised(codes + 4, _product(_float(rows, 108), few.char() - 32), None)


def _tq2_0(rows: Tensor) -> Quantised:
    return Quantised(_bits(rows[..., :64], 8, 32, 2) + 1, _float(rows, 64), None)


def _tq1_0(rows: Tensor) -> Quantised:
    """A byte is a fraction of five digits of base 3: each times 3 leaves the next digit."""

    def digits(data: Tensor, count: int) -> Tensor:
        powers = torch.tensor([3**i for i in range(count)], dtype=torch.uint8)[:, None]
        return ((data.unsqueeze(-2) * powers).short() * 3 >> 8).byte().flatten(-2)

    parts = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
    codes = torch.cat([digits(rows[..., a:b], count) for a, b, count in parts], -1)
    return Quantised(codes + 1, _float(rows, 52), None)


def _format(kind: str, block: int, *, zeros: bool = False) -> Format:
    return Format(kind, block, zeros, scales="f16", float_zeros=zeros)


STORED = {
    "Q8_0": StoredType(_format("int8", 32), _q8_0),
    "Q6_K": StoredType(_format("int6", 16), _q6_k),
    "Q5_0": StoredType(_format("int5", 32), _q5),
    "Q5_1": StoredType(_format("int5", 32, zeros=True), _q5_1),
    "Q5_K": StoredType(_format("int5", 32, zeros=True), _q5_k),
    "Q4_0": StoredType(_format("int4", 32), _q4),
    "Q4_1": StoredType(_format("int4", 32, zeros=True), _q4_1),
    "Q4_K": StoredType(_format("int4", 32, zeros=True), _q4_k),
    "Q3_K": StoredType(_format("int4", 16), _q3_k),
    "Q2_K": StoredType(_format("int2", 16, zeros=True), _q2_k),
    "TQ1_0": StoredType(_format("int2", 256), _tq1_0),
    "TQ2_0": StoredType(_format("int2", 256), _tq2_0),
    "MXFP4": StoredType(Format("mxfp4", 32), _mxfp4),
}
"""By the type. Q3_K has the fewest bits that blocks of 16 fill words with."""
