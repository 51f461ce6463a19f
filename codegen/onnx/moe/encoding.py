"""Codes, scales and zeros in the form of ONNX Runtime's kernels.

    w[n, k] = (code[n, k] - zero[n, k / block]) * scale[n, k / block]     no zero: 2^(bits-1)

Every scale is float32 and belongs to a block. Kernels with one scale per row are many times slower
(a layer of 64 experts at one token: 13 ms, against 0.7 ms with blocks), so the scale of a row is
repeated for each block. No kernel supports mxfp4 with float32 rows. Twice an mxfp4 value is an
integer, so mxfp4 codes are converted to equivalent int8 codes. Codes of 2, 3, 5 and 6 bits, for
which there are no kernels either, become codes of four or eight bits; without zeros, their middle
becomes the middle of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.ir.formats.integer import E2M1_TWICE
from moec.ir.formats.notation import Format
from moec.ir.ops.experts.quantised import GroupedQuantised, Matrix

ROW_BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes for formats with one scale per row, the best first. From 64 tokens on, 256 took 10 to
15% less time than 128. 512, which like one scale per row has no fast kernel, took three to twenty
times as long."""


@dataclass(frozen=True)
class Encoding:
    """`bits` per code, `block` weights per scale, and the format that codes are converted from."""

    bits: int
    block: int
    format: Format

    @staticmethod
    def of(parts: Sequence[GroupedQuantised]) -> Encoding:
        """The encoding with one block size for all weights of a node. The last block of a row may
        be partial."""
        format = parts[0].format
        widths = [_width(part.matrices[0]) for part in parts]
        fitting = (b for b in ROW_BLOCKS if all(width % b == 0 for width in widths))
        bits = 4 if format.bits <= 4 and format.kind != "mxfp4" else 8
        return Encoding(bits, format.block or next(fitting, ROW_BLOCKS[-1]), format)

    def blocks(self, width: int) -> int:
        return -(-width // self.block)

    def codes(self, codes: Tensor) -> Tensor:
        """u8[.., N, K]: one code of `bits` per element."""
        if self.format.kind != "mxfp4":
            return codes + self._above
        magnitudes = torch.tensor(E2M1_TWICE, dtype=torch.int16)
        return (torch.cat([magnitudes, -magnitudes])[codes.int()] + 128).byte()

    def scales(self, scales: Tensor, width: int) -> Tensor:
        """The scales, f32[.., N, blocks]."""
        if self.format.kind == "mxfp4":
            ones = torch.ones(scales.shape)
            return self._repeated(torch.ldexp(ones, scales.int() - 128), width)
        return self._repeated(scales.float(), width)

    def zeros(self, zeros: Tensor, width: int) -> Tensor:
        """The zeros, u8[.., N, blocks]."""
        return self._repeated(zeros, width)

    @property
    def _above(self) -> int:
        """What codes have to be raised by, so that their middle is the zero that is not written."""
        if self.format.asymmetric:
            return 0
        return (1 << self.bits - 1) - (1 << self.format.bits - 1)

    def _repeated(self, values: Tensor, width: int) -> Tensor:
        return values.repeat_interleave(self.blocks(width) // values.shape[-1], -1)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Packs codes along the last axis into bytes; the first of two codes has the low bits."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _width(matrix: Matrix) -> int:
    return int(str(matrix.codes.shape[-1]))
