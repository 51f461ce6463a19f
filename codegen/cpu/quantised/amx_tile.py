"""The register tile of quantised weights on AMX: up to 32 rows of codes times a tile's columns.

    integers[16 r .., 16 j ..] = x[16 rows of r, 64 codes of K] @ w[64 codes of K, 16 of vector j]

Integer sums are exact, and the sums of blocks become floats and are added as in tile.py: the
results have the same bits, so few rows may use that tile and many rows this one. Weights of fewer
bits than 8 are first unpacked to bytes, once for all rows. Blocks of 32 codes would fill only half
of a register, and moving their sums out would take longer than dot products. 16-bit rows are half
as many, with one block of registers for their upper bytes and one for the lower.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.gemm.row_blocks import ceildiv
from moec.codegen.cpu.gemm.tile import RowRun
from moec.codegen.cpu.llvm.amx import TILE_BYTES, TILE_ROWS
from moec.codegen.cpu.quantised import integers
from moec.codegen.cpu.quantised.tile import QuantisedTile

BLOCKS = 2  # blocks of rows whose sums are in registers, each for two vectors
DOTS_BELOW = 24  # with fewer rows of an expert, dot products are used instead of AMX
CODES = TILE_BYTES  # codes of a row in one register, and the words that they take
WORDS = CODES // 4
_ROWS, _WEIGHTS = 4, 6  # the first register of rows, and of weights; those below hold sums


@dataclass(frozen=True)
class _Scratch:
    """The scratch of a task, in its cache: rows of x, their scales and sums, unpacked weights."""

    rows: Buffer  # [BLOCKS, steps of K, TILE_ROWS, WORDS]
    factors: Buffer  # [most rows, blocks]
    totals: Buffer  # [most rows, planes * blocks]
    bytes: Buffer | None  # [words of K, columns]
    integers: Buffer  # [blocks at once, BLOCKS * TILE_ROWS, lanes of two vectors]
    scales: Buffer  # [blocks at once, lanes of two vectors]; what of those belongs to weights
    zeros: Buffer
    sums: Buffer  # [most rows, columns]


@dataclass(frozen=True)
class AmxQuantisedTile(QuantisedTile):
    """Emits the loops over rows and K for some tiles of columns."""

    @property
    def row_chunk(self) -> int:
        """Rows that fit half of the L2 cache while tiles of weights are streamed."""
        fit = self.layout.target.l2 // 2 // (self._planes * self.layout.x_words * 4)
        return max(1, fit // self._most_rows) * self._most_rows

    @property
    def _planes(self) -> int:
        return self.layout.row_codes.planes

    @property
    def _blocks_of_rows(self) -> int:
        """Blocks of rows whose planes are all in registers."""
        return BLOCKS // self._planes

    @property
    def _most_rows(self) -> int:
        return self._blocks_of_rows * TILE_ROWS

    def rows(self, run: RowRun) -> None:
        with T.If(run.count < DOTS_BELOW // self._planes):
            with T.Then():
                super().rows(run)
            with T.Else():
                self._many(run)

    def _many(self, run: RowRun) -> None:
        group, tile, first, count, _, tiles = run
        v, lay, bits = self.vector, self.layout, self.layout.spec.format.bits
        steps, most = lay.spec.k // CODES, self._most_rows
        scratch = _Scratch(
            v.scratch((BLOCKS, steps, TILE_ROWS, WORDS), "int32"),
            v.scratch((most, lay.blocks), "float32"),
            v.scratch((most, self._planes * lay.blocks), "int32"),
            v.scratch((lay.spec.k // 4, lay.columns), "int32") if bits < 8 else None,
            v.scratch((lay.blocks_at_once, BLOCKS * TILE_ROWS, 2 * v.lanes), "int32"),
            v.scratch((lay.blocks_at_once, 2 * v.lanes), "float32"),
            v.scratch((lay.blocks_at_once, 2 * v.lanes), "int32"),
            v.scratch((most, lay.columns), "float32"),
        )
        v.tiles("begin")
        with T.serial(0, ceildiv(count, most)) as part:
            row = T.bind(first + part * most)
            m = T.bind(T.min(first + count - row, T.int64(most)))
            lying = T.bind(T.int64(0) if self.operands.gathered else T.truncdiv(m, TILE_ROWS))
            self._copy(row, lying, m, scratch)
            with T.serial(0, tiles) as t:
                column_tile = T.bind(tile + t)
                if scratch.bytes is not None:
                    self._take_apart(group, column_tile, scratch.bytes)
                for blocks in range(1, self._blocks_of_rows + 1):
                    fits = ceildiv(m, TILE_ROWS) == blocks
                    with T.If(fits), T.Then():
                        self._products(group, column_tile, row, blocks, lying, m, scratch)
                with T.serial(0, m) as i:
                    lanes = [T.ramp(j * v.lanes, 1, v.lanes) for j in range(lay.vectors)]
                    row_sums = [scratch.sums[i, lane] for lane in lanes]
                    self._finish_row(row_sums, T.bind(row + i), group, column_tile)
        v.tiles("end")

    def _copy(self, row: Expr, lying: Expr, m: Expr, scratch: _Scratch) -> None:
        """Copies scales and sums of all rows, and the codes of the blocks of rows from `lying` on;
        rows after row `m` repeat it."""
        v, lay, ops, planes = self.vector, self.layout, self.operands, self._planes
        sources = T.alloc_buffer((self._most_rows,), "int64")
        with T.serial(0, self._most_rows) as i:
            source = T.bind(ops.x_row(row + T.min(T.Cast("int64", i), m - 1)))
            T.buffer_store(sources, source, [i])
            with T.serial(0, lay.blocks) as block:
                T.buffer_store(scratch.factors, ops.x_scales[source, block], [i, block])
            with T.serial(0, planes * lay.blocks) as block:
                T.buffer_store(scratch.totals, ops.sums[source, block], [i, block])
        with T.serial(lying, ceildiv(m, TILE_ROWS)) as block, T.serial(0, planes) as plane:
            with T.serial(0, lay.spec.k // CODES) as step, T.serial(0, TILE_ROWS) as i:
                word = plane * lay.x_words + step * WORDS
                there = ops.x[sources[block * TILE_ROWS + i], word]
                to = scratch.rows[block * planes + plane, step, i, 0]
                v.copy_line(to, there)

    def _take_apart(self, group: Expr, tile: Expr, to: Buffer) -> None:
        """Units of codes -> words of four signed bytes, minus the zeros."""
        v, lay, w = self.vector, self.layout, self.operands.w
        with T.serial(0, lay.blocks) as block:
            zeros = [integers.in_all_bytes(v, zero) for zero in self._zeros(group, tile, block)]
            units = lay.depth_block // lay.unit
            with T.serial(0, units) as step:
                unit = T.bind(block * units + step)
                for j, zero in enumerate(zeros):
                    lane = T.ramp(j * v.lanes, 1, v.lanes)
                    words = [w[group, tile, unit * lay.unit + i, lane] for i in range(lay.unit)]
                    for quad, codes in enumerate(self._codes(words)):
                        signed = integers.minus4(v, codes, zero)
                        at = unit * (lay.unit_codes // 4) + quad
                        T.buffer_store(to, signed, [at, lane])

    def _products(
        self,
        group: Expr,
        tile: Expr,
        row: Expr,
        blocks: int,
        lying: Expr,
        m: Expr,
        scratch: _Scratch,
    ) -> None:
        """scratch.sums of all columns, two vectors at a time, for `blocks` blocks of rows."""
        v, lay = self.vector, self.layout
        for j in range(0, lay.vectors, 2):
            vectors = range(j, min(j + 2, lay.vectors))
            if lay.blocks > 1:
                with T.serial(0, m) as i:
                    for one in vectors:
                        lane = T.ramp(one * v.lanes, 1, v.lanes)
                        T.buffer_store(scratch.sums, v.splat(0.0), [i, lane])
            many = lay.blocks_at_once
            with T.serial(0, lay.blocks // many) as turn:
                with T.serial(0, many) as g:
                    block = T.bind(turn * many + g)
                    self._integers_of(group, tile, row, blocks, lying, block, g, vectors, scratch)
                self._add(group, tile, m, T.bind(turn * many), vectors, scratch)

    def _integers_of(
        self,
        group: Expr,
        tile: Expr,
        row: Expr,
        blocks: int,
        lying: Expr,
        block: Expr,
        g: Expr,
        vectors: range,
        scratch: _Scratch,
    ) -> None:
        """scratch.integers[g] of one block of K: of the planes of each block of rows in turn."""
        v, lay, ops, planes = self.vector, self.layout, self.operands, self._planes
        block_words = lay.spec.k // lay.blocks // 4
        planes_of_all = range(blocks * planes)
        sums = {(b, j): b * 2 + at for b in planes_of_all for at, j in enumerate(vectors)}
        for register in sums.values():
            v.tile_zero(register)
        with T.serial(0, block_words // WORDS) as step:
            word = T.bind(block * block_words + step * WORDS)
            for at, j in enumerate(vectors):
                if scratch.bytes is not None:
                    weights = scratch.bytes[word, j * v.lanes]
                else:
                    weights = ops.w[group, tile, word, j * v.lanes]
                v.tile_load(_WEIGHTS + at, weights, lay.columns * 4)
            for b in planes_of_all:
                copied = scratch.rows[b, T.truncdiv(word, WORDS), 0, 0]
                if ops.gathered:
                    v.tile_load(_ROWS + b, copied, TILE_BYTES)
                else:
                    block_of_rows, plane = divmod(b, planes)
                    there = ops.x[row + block_of_rows * TILE_ROWS, plane * lay.x_words + word]
                    lies = T.Cast("int32", block_of_rows < lying)
                    strides = planes * lay.x_words * 4, TILE_BYTES
                    v.tile_load_either(_ROWS + b, lies, there, strides[0], copied, strides[1])
            for (b, j), register in sums.items():
                numbers = register, _ROWS + b, _WEIGHTS + j - vectors.start
                v.tile_int8(*numbers, signed=scratch.bytes is not None)
        for (b, j), register in sums.items():
            to = scratch.integers[g, b * TILE_ROWS, (j - vectors.start) * v.lanes]
            v.tile_store(register, to, 2 * v.lanes * 4)

    def _add(
        self, group: Expr, tile: Expr, m: Expr, first: Expr, vectors: range, scratch: _Scratch
    ) -> None:
        """scratch.sums += the integers of some blocks of K, as floats, block after block."""
        v, lay = self.vector, self.layout
        lanes = [T.ramp(at * v.lanes, 1, v.lanes) for at in range(len(vectors))]
        for g in range(lay.blocks_at_once):
            scales = self._scales(group, tile, first + g)
            for lane, j in zip(lanes, vectors, strict=True):
                T.buffer_store(scratch.scales, scales[j], [g, lane])
                if scratch.bytes is None:
                    zero = self._zeros(group, tile, first + g)[j]
                    T.buffer_store(scratch.zeros, zero, [g, lane])
        with T.serial(0, m) as i:
            for lane, j in zip(lanes, vectors, strict=True):
                to = T.ramp(j * v.lanes, 1, v.lanes)
                total = T.bind(v.splat(0.0) if lay.blocks == 1 else scratch.sums[i, to])
                for g in range(lay.blocks_at_once):
                    factor = v.splat(scratch.factors[i, first + g])
                    planes = range(self._planes)
                    wholes = [scratch.integers[g, p * TILE_ROWS + i, lane] for p in planes]
                    if scratch.bytes is None:
                        at = [[i, p * lay.blocks + first + g] for p in planes]
                        totals = [T.broadcast(scratch.totals[tuple(a)], v.lanes) for a in at]
                        zero = T.bind(scratch.zeros[g, lane])
                        wholes = [w - zero * t for w, t in zip(wholes, totals, strict=True)]
                    real = integers.joined(v, wholes)
                    if lay.blocks == 1:
                        total = T.bind(real * (scratch.scales[g, lane] * factor))
                    else:
                        total = T.bind(v.fma(T.bind(real * factor), scratch.scales[g, lane], total))
                T.buffer_store(scratch.sums, total, [i, to])
