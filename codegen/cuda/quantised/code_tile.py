"""A tile of a product with weights of few bits, by mma.sync; codes are widened in registers.

    a stage     x f16[rows, depth] of each plane, then the codes of w[columns, depth]
    a code      loaded by ldmatrix without unpacking; `and`, `or`, and one fma widen two codes

The codes of rows and weights are integers, or fractions of two binary places, in float16. Their
products are summed in float32, separately for each block of k. At the end of a block, the sum is
multiplied by the scales of its row and its column. So the result is that of integer arithmetic,
exact up to 2^24.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.gemm.gemv import row_of_x
from moec.codegen.cuda.gemm.mma_tile import MmaTile, mma_tile, part_of_w, part_of_x
from moec.codegen.cuda.gemm.product import Product
from moec.codegen.cuda.gemm.tiles import ExpertRows, TileShape
from moec.codegen.cuda.instructions import fma, load_fragments
from moec.codegen.cuda.quantised.codes import (
    STEP,
    WORDS,
    Codes,
    piece_of,
    place,
    weight_pair,
    zero_pair,
)
from moec.codegen.cuda.quantised.round_rows import planes_of
from moec.codegen.specs.products import QuantisedSpec


def stage_of(shape: TileShape, spec: QuantisedSpec) -> int:
    """The size of a stage, in elements of 16 bits."""
    return shape.depth * (
        shape.rows * planes_of(spec.format.row_bits) + shape.columns * spec.format.bits // 16
    )


@dataclass(frozen=True)
class CodeTile:
    """Buffers of one thread block. `tile.sums` are the sums of the current block of k, unscaled;
    `totals` are scaled."""

    tile: MmaTile
    p: Product
    spec: QuantisedSpec
    codes: Codes
    totals: Buffer
    rows: Buffer  # int32: the rows of x of this thread's sums
    words: Buffer  # codes of a stage that this lane multiplies
    zeros: Buffer
    scales: Buffer

    @property
    def size(self) -> int:
        """The number of weights that share one scale."""
        return self.spec.k // self.spec.format.blocks(self.spec.k)

    @property
    def in_blocks(self) -> bool:
        return self.size < self.spec.k

    @property
    def result(self) -> MmaTile:
        """The tile whose sums are the result, for storing."""
        return replace(self.tile, sums=self.totals) if self.in_blocks else self.tile

    def compute(self, owned: ExpertRows, column: Expr, copies: Buffer) -> None:
        """Computes result.sums = x @ w^T, with all scales applied."""
        tile, spec, depth = self.tile, self.spec, self.tile.shape.depth
        expert = T.bind(T.cast(owned.expert, "int64"))
        for t, half in itertools.product(range(tile.row_fragments), range(2)):
            row = tile.first_row + t * 16 + half * 8 + tile.lane // 4
            T.buffer_store(self.rows, row_of_x(self.p, owned, row), [t * 2 + half])
        first = T.bind(column + tile.first_column)
        tile.clear(self.result.sums)
        if not self.in_blocks:
            self._read_zeros(expert, first, T.int32(0))
        planes = part_of_x(self.p, tile, owned, copies, planes_of(spec.format.row_bits))
        width = depth * spec.format.bits // 16
        w = part_of_w(self.p, tile, owned, column, width)
        tile.stages.run([*planes, w], lambda base, step: self._multiply(base, step, expert, first))
        if not self.in_blocks:
            self._scale(expert, first, T.int32(0))

    def _multiply(self, base: Expr, step: Expr, expert: Expr, first: Expr) -> None:
        tile, depth = self.tile, self.tile.shape.depth
        planes, rows = planes_of(self.spec.format.row_bits), tile.shape.rows
        self._read_codes(base + planes * rows * depth)
        size = min(self.size, depth) if self.in_blocks else depth
        for start in range(0, depth, size):
            if self.in_blocks:
                k = T.min(step * depth + start, self.spec.k - 1)  # beyond the end all codes are 0
                block = T.bind(k // self.size)
                self._read_zeros(expert, first, block)
                tile.clear(tile.sums)
            for k in range(start // STEP, (start + size) // STEP):
                self._widen(k)
                for plane in range(planes):
                    tile.load_rows(base + plane * rows * depth, k)
                    tile.multiply()
            if self.in_blocks:
                self._scale(expert, first, block)

    def _read_codes(self, base: Expr) -> None:
        """Loads the codes: consecutive pieces of a column, where one matrix is one piece of eight
        columns."""
        tile, width = self.tile, self.tile.shape.depth * self.spec.format.bits // 16
        pieces, lane = width // 8, tile.lane
        for first in range(0, tile.column_fragments * pieces, WORDS):
            matrix = T.bind(first + lane // 8)
            row = T.bind(tile.first_column + matrix // pieces * 8 + lane % 8)
            at = tile.stages.offset(row, T.bind(matrix % pieces), width)
            words = [self.words[first + i] for i in range(WORDS)]
            load_fragments(words, tile.stages.pointer(base + at))

    def _widen(self, k: int) -> None:
        """Writes to tile.b the weights of the k-th 16 of the stage."""
        format = self.spec.format
        steps = piece_of(format.bits) // STEP
        pieces = self.tile.shape.depth // STEP // steps
        for u, half in itertools.product(range(self.tile.column_fragments), range(2)):
            word = self.words[u * pieces + k // steps]
            index = place(format.bits, k % steps, half, 0)
            target = self.tile.b[u * 2 + half]
            zero = self.zeros[u] if self.codes.zeros is not None else zero_pair(format.bits, None)
            weight_pair(format.kind, format.bits, word, index, zero, target)

    def _read_zeros(self, expert: Expr, first: Expr, block: Expr) -> None:
        if self.codes.zeros is None:
            return
        for u in range(self.tile.column_fragments):
            column = self._clamp(first + u * 8 + self.tile.lane // 4)
            zero = T.bind(T.cast(self.codes.zeros[expert, column, block], "uint32"))
            T.buffer_store(self.zeros, zero_pair(self.spec.format.bits, zero), [u])

    def _scale(self, expert: Expr, first: Expr, block: Expr) -> None:
        """totals += sums * the scales of this block. With one scale for all of k, scales the sums
        in place."""
        tile, kind = self.tile, self.spec.format.kind
        for u, i in itertools.product(range(tile.column_fragments), range(2)):
            column = self._clamp(first + u * 8 + tile.lane % 4 * 2 + i)
            T.buffer_store(self.scales, self.codes.scale(kind, expert, column, block), [u * 2 + i])
        for t, half in itertools.product(range(tile.row_fragments), range(2)):
            row = T.cast(self.rows[t * 2 + half], "int64")
            row_scale = T.bind(self.codes.row_scales[row, block])
            for u, i in itertools.product(range(tile.column_fragments), range(2)):
                at = tile.sum_index(t, u, half) + i
                scale = row_scale * self.scales[u * 2 + i]
                if self.in_blocks:
                    T.buffer_store(self.totals, fma(tile.sums[at], scale, self.totals[at]), [at])
                else:
                    T.buffer_store(tile.sums, tile.sums[at] * scale, [at])

    def _clamp(self, column: Expr) -> Expr:
        """The column, clamped to the last one: columns beyond the end are computed but not
        stored."""
        if self.p.columns % self.tile.shape.columns:
            column = T.min(column, self.p.columns - 1)
        return T.bind(column)


def code_tile(shape: TileShape, p: Product, codes: Codes, thread: Expr) -> CodeTile:
    """Allocates the buffers of one thread block."""
    spec = p.spec
    assert isinstance(spec, QuantisedSpec)
    tile = mma_tile(shape, "float16", spec.k, thread, stage_of(shape, spec))
    sums = tile.row_fragments * tile.column_fragments * 4
    pieces = shape.depth // piece_of(spec.format.bits)

    def local(size: int, dtype: str) -> Buffer:
        return T.alloc_buffer((size,), dtype, scope="local")

    return CodeTile(
        tile,
        p,
        spec,
        codes,
        local(sums, "float32"),
        local(tile.row_fragments * 2, "int32"),
        local(tile.column_fragments * pieces, "uint32"),
        local(tile.column_fragments, "uint32"),
        local(tile.column_fragments * 2, "float32"),
    )
