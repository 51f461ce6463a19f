"""Quantised numbers: how weights and rows become codes with scales, and the values of codes.

    int8 to int2  w = (code - zero) * scale       code 0 .. 2^bits - 1, zero 2^(bits-1) or given
                  w = code * scale - zero         where zeros are floats
    fp8           w = e4m3(code) * scale          OCP 8-bit Floating Point 1.0
    mxfp4         w = e2m1(code) * 2^(scale-127)  OCP Microscaling Formats 1.0, blocks of 32

A scale (and a zero) belongs to a row of a weight [.., N, K], or to a block of a row. Rows of
activations are quantised at run time, to integers of 8 bits (-127 .. 127) or of 16 bits
(-32639 .. 32639, 257 times as fine), with one scale for each block of the weights: products are
then sums of integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.ir.formats.notation import BITS, Format

E4M3_MOST = 448.0
"""The greatest magnitude of e4m3, which has no infinity. No finite weight becomes its NaN."""
# The values of e2m1, doubled to be integers. Codes 8 to 15 are their negatives.
E2M1_TWICE = (0, 1, 2, 3, 4, 6, 8, 12)
E2M1_ZERO = max(E2M1_TWICE)  # kernels add this to doubled values of e2m1 to make them unsigned
MOST_SUMMED = 65536
"""The most weights of one scale: a sum of so many products of bytes, of rows (-128 .. 127) and of
weights minus their zeros (-255 .. 255), is below 2^31."""
TINY = 1e-30
"""A block of activations without a greater magnitude becomes 0: its scale has no inverse."""
MOST_HELD = 1 << 28
"""Bytes of values that `dequantised_once` keeps."""
_SOME = 1 << 18
_ONCE: ContextVar[dict[Any, tuple[Tensor, Any]] | None] = ContextVar("_ONCE", default=None)


@dataclass(frozen=True)
class Quantised:
    """codes u8[E, N, K], scales bf16, f16, f32 or u8[E, N, blocks], zeros [E, N, blocks] of u8 or
    of the scales' dtype, or None."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


def quantise(format: Format, weight: Tensor) -> Quantised:
    """Each weight [E, N, K] rounded to the nearest code.

    Symmetric scales map the value of greatest magnitude of a row or block to -2^(bits-1), so that
    all codes are used; fp8 maps it to 448. Asymmetric scales map the range of a row or block,
    extended to include 0. Codes are computed with the stored (rounded) scale. Raises ValueError
    where a block does not divide K.
    """
    width = weight.shape[-1]
    if format.block and width % format.block:
        raise ValueError(f"blocks of {format.block} do not divide {width}")
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    shape = (*weight.shape[:-1], format.blocks(width))
    scale_dtype = torch.uint8 if format.scale_dtype == "u8" else torch.bfloat16
    scales = torch.empty(shape, dtype=scale_dtype)
    zeros = torch.empty(shape, dtype=torch.uint8) if format.asymmetric else None
    # One matrix at a time: a float32 copy of a whole stack would be larger than the stack.
    # A scale that had a derivative would hold it nonetheless.
    for e, matrix in enumerate(weight.detach()):
        full = matrix.float()
        scales[e], zero = _scales(format, full.reshape(-1, shape[-1], width // shape[-1]))
        if zeros is not None and zero is not None:
            zeros[e] = zero
        codes[e] = encode(format, full, scales[e], None if zeros is None else zeros[e])
    return Quantised(codes, scales, zeros)


def encode(format: Format, weight: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """Codes u8[.., N, K] of float32 weights, nearest with the given scales and zeros [.., N, b]."""
    by_block = weight.reshape(*scales.shape, weight.shape[-1] // scales.shape[-1])
    if format.kind == "mxfp4":
        return _e2m1(torch.ldexp(by_block, 127 - scales.int()[..., None])).flatten(-2)
    if format.kind == "fp8":
        values = (by_block / scales.float()[..., None]).clamp_(-E4M3_MOST, E4M3_MOST)
        return values.to(torch.float8_e4m3fn).view(torch.uint8).flatten(-2)
    levels = 2**format.bits
    zero = float(levels // 2) if zeros is None else zeros.float()[..., None]
    if format.float_zeros:
        by_block, zero = by_block + zero, 0.0
    codes: Tensor = (by_block / scales.float()[..., None]).round_().add_(zero)
    return codes.clamp_(0, levels - 1).byte().flatten(-2)


def rounded(bits: int, weight: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """The nearest values of integer codes, f32, with a scale and a zero, f32, for each weight: as
    `dequantise` of `encode`, without their bytes."""
    levels = 2**bits
    codes = (weight / scales).round_()
    if zeros is None:
        return codes.clamp_(-(levels // 2), levels // 2 - 1).mul_(scales)
    return codes.clamp_(-zeros, levels - 1 - zeros).mul_(scales)


def _scales(format: Format, w: Tensor) -> tuple[Tensor, Tensor | None]:
    """scales and zeros [N, blocks] of w[N, blocks, block]."""
    if format.kind == "mxfp4":
        # OCP, section 6.3: the shared exponent is that of the greatest magnitude minus 2, the
        # greatest exponent of e2m1.
        greatest = w.abs().amax(-1)
        _, exponent = torch.frexp(greatest)  # greatest = m * 2^exponent with 0.5 <= m < 1
        shared = torch.where(greatest > 0, exponent - 1 - 2, 0).clamp(-126, 127)
        return (shared + 127).byte(), None
    if format.kind == "fp8":
        return _stored(w.abs().amax(-1) / E4M3_MOST), None
    levels = 2**format.bits
    low, high = torch.aminmax(w, dim=-1)
    if not format.asymmetric:
        greatest = torch.where(high > -low, high, low)
        return _stored(greatest / -(levels // 2)), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _stored((high - low) / (levels - 1))
    return scale, (-low / scale.float()).round().clamp(0, levels - 1).byte()


def _stored(scale: Tensor) -> Tensor:
    """The scale as it is stored; 1 where all weights are 0 or too small for a scale."""
    stored = scale.bfloat16()
    return torch.where(stored.float().abs() > TINY, stored, torch.ones_like(stored))


def _e2m1(w: Tensor) -> Tensor:
    """Codes of e2m1 nearest to w; magnitudes beyond 6 become 6."""
    scaled = w.abs()
    # The spacing of codes is 1/2 up to 2, 1 up to 4, and 2 beyond; ties go to the even code.
    code = (scaled * 2).round_()
    code = torch.where(scaled > 2, scaled.round() + 2, code)
    code = torch.where(scaled > 4, (scaled / 2).round_() + 4, code).clamp_(max=7)
    return torch.where(w < 0, code + 8, code).byte()


@contextmanager
def dequantised_once() -> Iterator[None]:
    """While open, `dequantise` gives the same result for the same tensors again, which none of its
    users may change."""
    token = _ONCE.set({})
    try:
        yield
    finally:
        _ONCE.reset(token)


def dequantise(kind: str, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """The weights f32[.., N, K] of codes, scales and zeros."""
    once, tensors = _ONCE.get(), (codes, scales, codes if zeros is None else zeros)
    key = (kind, *((t.data_ptr(), t.shape, t.stride()) for t in tensors))
    if once is not None and key in once:
        return once[key][0]
    values = _dequantised(kind, codes, scales, zeros)
    if once is not None:
        if sum(each.nbytes for each, _ in once.values()) + values.nbytes <= MOST_HELD:
            once[key] = values, tensors  # so that no others have their addresses
    return values


def _dequantised(kind: str, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    by_block = (*scales.shape, codes.shape[-1] // scales.shape[-1])
    if kind == "mxfp4":
        table = torch.tensor([*E2M1_TWICE, *(-v for v in E2M1_TWICE)]) / 2
        values = table[codes.int()].reshape(by_block)
        return torch.ldexp(values, scales.int()[..., None] - 127).flatten(-2)
    if kind == "fp8":
        values = codes.view(torch.float8_e4m3fn).float().reshape(by_block)
        return values.mul_(scales.float()[..., None]).flatten(-2)
    values = codes.float().reshape(by_block)  # a copy, changed in place: no other is as large
    if zeros is not None and zeros.is_floating_point():
        return values.mul_(scales.float()[..., None]).sub_(zeros.float()[..., None]).flatten(-2)
    zero = float(2 ** (BITS[kind] - 1)) if zeros is None else zeros.float()[..., None]
    return values.sub_(zero).mul_(scales.float()[..., None]).flatten(-2)


def some_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows at a time of a weight [N, K] and of its codes, scales and zeros, so that copies of
    them in float32 stay in the processor's cache."""
    step = max(1, _SOME // max(1, tensors[0].shape[-1]))
    return zip(*(torch.split(tensor, step) for tensor in tensors), strict=True)


def most_of(bits: int) -> float:
    """The greatest code of activations of 8 or 16 bits. Kernels split a code of 16 bits into two
    signed bytes, 256 * high + low, so the greatest is 256 * 127 + 127."""
    return {8: 127.0, 16: 32639.0}[bits]


def round_rows(x: Tensor, blocks: int, bits: int = 8) -> Tensor:
    """x[R, K] in float32 after rounding to integers of `bits` bits, with a scale for each block;
    not rounded with 0 bits.

    A block that holds an infinity or a NaN becomes NaN. The derivative is that of rows that are not
    rounded (a straight-through estimator, arXiv 1308.3432).
    """
    if not bits:
        return x.float()
    full = x.detach().float().reshape(*x.shape[:-1], blocks, x.shape[-1] // blocks)
    greatest = full.abs().amax(-1, keepdim=True)
    most = most_of(bits)
    inverse = torch.where(greatest > TINY, most / greatest, torch.zeros_like(greatest))
    scale = greatest * torch.tensor(1 / most)
    scale = torch.where(greatest.isfinite(), scale, torch.full_like(scale, torch.nan))
    rounded = ((full * inverse).round() * scale).flatten(-2)
    return rounded + (x - x.detach()).float() if x.requires_grad else rounded
