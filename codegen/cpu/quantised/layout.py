"""The layout of quantised weights: tiles of columns, words of codes along K (words.py).

    codes  u8[E, N, K]       ->  int32[E, tiles, words, columns]     a word holds 32 / bits codes
    scales [E, N, blocks]    ->       [E, tiles, blocks, columns]    zeros likewise

A tile of codes is one contiguous stream, and the scales of its blocks are a second one. Missing
columns and codes after K are 0; so are rows of x there.

The bytes of a vector of words of e4m3 are permuted: codes 0 and 1 of each word are the lower bytes
of two 16-bit lanes, 2 and 3 the upper bytes. A shift and a mask leave them as 16-bit floats:

    bf16 dot products   lanes 2c and 2c + 1 of n words are those of column c
    float32 otherwise   lanes c and n + c
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import torch
from torch import Tensor

from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.pack import Array
from moec.codegen.cpu.gemm.row_blocks import ceil_of
from moec.codegen.cpu.quantised import words
from moec.codegen.cpu.quantised.dot_products import Way, way
from moec.codegen.specs.products import QuantisedSpec
from moec.dtypes import LONG_NAMES
from moec.ir.formats.integer import E2M1_ZERO

ROW_STEP = 64
"""Rows of codes of x are padded to a multiple of this: a multiple of all words and vectors."""


@dataclass(frozen=True)
class RowCodes:
    """The layout of a row of x in int32 words, as integers of `bits`: consecutive, or in two
    `planes`, first the upper bytes and then the lower ones. Both bytes are signed, and the integer
    is 256 * upper + lower.
    """

    bits: int = 8
    planes: int = 1

    @property
    def per_word(self) -> int:
        """Codes in a word of a plane."""
        return 32 * self.planes // self.bits

    def words(self, width: int) -> int:
        """Words of one plane of a row of `width`, with padding. Each 16-bit integer is followed by
        at least 31 others, as such rows are read from any element on (compressed/masks.py)."""
        behind = 32 if self.per_word == 2 else 0
        return -(-(width + behind) // ROW_STEP) * ROW_STEP // self.per_word


BYTES = RowCodes()
PAIRS = RowCodes(16)
PLANES = RowCodes(16, 2)


@dataclass(frozen=True)
class QuantisedLayout(Layout):
    """The layout of codes, scales and zeros of `spec` on `target`. `narrow`: tiles are as wide for
    one scale a row as for one a block."""

    spec: QuantisedSpec
    narrow: bool = False

    @property
    def floats(self) -> bool:
        """Whether rows are floats of the spec's dtype, and weights e4m3 (fp8_tile.py)."""
        return self.spec.format.kind == "fp8"

    @property
    def tile_rows(self) -> int:
        """Rows of the register tile. Each plane of codes needs registers for its sums; scales per
        block need another set, for the float sums of all blocks."""
        sets = self.row_codes.planes + (1 if self.blocks > 1 else 0)
        return self.target.tile_rows * self.target.tile_vectors // (self._most_vectors * sets)

    @property
    def vectors(self) -> int:
        halves = 2 if self.spec.gated else 1
        needed = -(-self.spec.n // self.target.vector_lanes)
        return halves * min(self._most_vectors // halves, needed)

    @property
    def _most_vectors(self) -> int:
        most = self.target.tile_vectors
        narrow = self.narrow or (self.blocks > 1 and not self.floats)
        return min(most, 2) if narrow else most

    @property
    def blocks(self) -> int:
        return self.spec.format.blocks(self.spec.k)

    @property
    def amx(self) -> bool:
        """Whether AMX is used: blocks of codes fill tile registers, of 64 codes a row, and zeros
        are codes."""
        codes = self.spec.k // self.blocks
        full_rows = codes % 64 == 0 and not self.spec.format.float_zeros
        return self.target.int8_tiles and not self.floats and full_rows

    @property
    def float_tiles(self) -> bool:
        """Whether AMX multiplies e4m3 weights with rows of bf16: blocks of scales are whole
        registers, of 32 elements of K."""
        elements = self.spec.k // self.blocks
        return self.pairs and self.target.bf16_tiles and elements % 32 == 0

    @property
    def way(self) -> Way:
        """The instructions that multiply bytes."""
        format = self.spec.format
        greatest = 2 * E2M1_ZERO if format.kind == "mxfp4" else 2**format.bits - 1
        return way(self.target, greatest, self.unit_codes)

    @property
    def blocks_at_once(self) -> int:
        """Blocks whose integer sums are converted to floats together, with one load and store."""
        return max(many for many in range(1, 5) if self.blocks % many == 0)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.spec.groups, self.tiles, self.depth, self.columns)

    @property
    def unit(self) -> int:
        """The words of a unit of codes."""
        return words.words_of(self.spec.format.bits)

    @property
    def unit_codes(self) -> int:
        return 4 * words.quads_of(self.spec.format.bits)

    @property
    def depth(self) -> int:
        return ceil_of(self.spec.k, self.unit_codes) * self.unit

    @property
    def depth_block(self) -> int:
        """Words of a block of scales; of e4m3 with one scale, at most half of the L2 cache."""
        if self.floats and self.blocks == 1:
            blocks = ceil_of(self.depth * self.columns * 8, self.target.l2 // 2)
            return ceil_of(self.depth, blocks)
        return self.depth // self.blocks

    @property
    def pairs(self) -> bool:
        return self.floats and self.spec.dtype == "bfloat16"

    @property
    def dtype(self) -> str:
        return "int32"

    @property
    def scale_dtype(self) -> str:
        stored = self.spec.format.scale_dtype
        return "uint8" if stored == "u8" else LONG_NAMES[stored]

    @property
    def scale_shape(self) -> tuple[int, int, int, int]:
        return (self.spec.groups, self.tiles, self.blocks, self.columns)

    @property
    def row_codes(self) -> RowCodes:
        return BYTES if self.spec.format.row_bits == 8 else PLANES

    @property
    def x_words(self) -> int:
        """int32 words of a plane of a row of x, four codes each."""
        return self.row_codes.words(self.spec.k)


def pack_codes(layout: QuantisedLayout, *parts: Tensor) -> Array:
    """codes u8[E, N, K], for a gated layout gate and up -> int32 of `layout.shape`."""
    spec, bits = layout.spec, layout.spec.format.bits
    width = layout.depth * 32 // bits
    packed = torch.zeros(layout.shape, dtype=torch.int32)
    for e in range(spec.groups):  # so that intermediate tensors stay small
        for half, codes in enumerate(parts):
            full = torch.nn.functional.pad(codes[e], (0, width - spec.k))
            _place(layout, packed[e], half, words.packed(full, bits))
        if layout.floats:
            packed[e] = _widening_order(layout, packed[e])
    return packed.numpy()


def _widening_order(layout: QuantisedLayout, words: Tensor) -> Tensor:
    """Packed words [.., columns] with the bytes in the order of e4m3 (see above)."""
    # vectors, columns, bytes, 16-bit lanes of a column
    codes = words.view(torch.uint8).view(-1, layout.target.vector_lanes, 2, 2)
    axes = (0, 1, 3, 2) if layout.pairs and layout.target.bf16_dot else (0, 3, 1, 2)
    return codes.permute(axes).flatten().view(torch.int32).view(words.shape)


def mark_nan(scales: Tensor, codes: Tensor) -> Tensor:
    """Scales [.., N, blocks], NaN where a block of e4m3 codes u8[.., N, K] holds a NaN: all its
    products have a NaN in their sum. Kernels then need not tell NaN from numbers."""
    nan = (codes & 0x7F == 0x7F).reshape(*scales.shape, -1).any(-1)
    return scales.masked_fill(nan, torch.nan)


def pack_scales(layout: QuantisedLayout, *parts: Tensor) -> Array:
    """scales or zeros [E, N, blocks], for a gated layout gate and up -> `layout.scale_shape`."""
    dtype = parts[0].dtype
    packed = torch.zeros(layout.scale_shape, dtype=dtype)
    for half, scales in enumerate(parts):
        for e in range(layout.spec.groups):
            _place(layout, packed[e], half, scales[e])
    if dtype is torch.bfloat16:
        return packed.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return packed.numpy()


def _place(layout: QuantisedLayout, to: Tensor, half: int, rows: Tensor) -> None:
    """to[tiles, depth, columns] <- rows[N, depth], into the columns of one half."""
    width = layout.width
    missing = layout.tiles * width - len(rows)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, missing)).view(layout.tiles, width, -1)
    to[:, :, half * width : (half + 1) * width] = padded.mT
