"""The register tile of rows as codes of 8 or 16 bits and quantised weights.

    y[r] = f((sum of blocks b: sx[row, b] * sw[b] * (x[row, b] . (w[e, b] - z[b]))) + bias[e])

or, where zeros are floats, sx[row, b] * (sw[b] * (x[row, b] . w[e, b]) - z[b] * sum of x[row, b]).

Arithmetic inside a block is exact, on integers, with four products of bytes per instruction. The
sums of blocks are added in one order, by one thread: results do not depend on the number of threads
or on other rows.

The register tile is that of float32 (gemm/tile.py): some rows times the columns of a tile. If a row
has one scale, integers are summed over all of K. Otherwise each block's sum becomes a float and is
added to a second set of registers, which leaves room for half as many columns.

A row of 16 bits is two rows of bytes, multiplied with the same weights, which are read and unpacked
once: x = 256 a + b, so x . w = 256 (a . w) + b . w. Both sums are exact in int32
(formats.integer.MOST_SUMMED) and are combined as floats at the end of a block. In blocks of at most
128 they are exact in float32 too, and combining them rounds once; sums over all of K round two more
times, by 2^-24, while rows were rounded to 2^-16 of their greatest. (No alternative is faster. Dot
products of pairs, of 16-bit integers or bf16, compute half as many products per instruction as
those of bytes, so they take as long, and weights must first be widened. The former overflow int32
after 256 elements of K; the latter hold 8 bits of a row, and few CPUs have them.)
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.gemm.prefetch import Following
from moec.codegen.cpu.gemm.tile import Fetch, Operands, RowRun, Tile
from moec.codegen.cpu.quantised import integers
from moec.codegen.cpu.quantised.dot_products import dots
from moec.codegen.cpu.quantised.layout import QuantisedLayout
from moec.codegen.cpu.quantised.words import unpacked
from moec.ir.formats.integer import E2M1_ZERO


@dataclass(frozen=True)
class QuantisedOperands(Operands):
    """`x` holds the codes of rows (round_rows.py), `w` the codes of weights."""

    x_scales: Buffer
    sums: Buffer
    w_scales: Buffer
    zeros: Buffer | None


@dataclass(frozen=True)
class QuantisedTile(Tile):
    """Emits the loops over rows and K for one tile of columns."""

    layout: QuantisedLayout
    operands: QuantisedOperands

    def _rows_of(self, run: RowRun) -> None:
        group, tile, first, count, following, _ = run

        def row_block(row: Expr, m: int, fetch: Fetch | None) -> None:
            self._row_block(group, tile, row, m, fetch)

        after = Following(*following, 0, 0, self.layout.depth)
        self._in_blocks(group, tile, first, count, self.layout.tile_rows, after, row_block)

    def _row_block(
        self,
        group: Expr,
        tile: Expr,
        row: Expr,
        m: int,
        fetch: Fetch | None,
    ) -> None:
        """Computes `m` rows from `row` on."""
        v, lay = self.vector, self.layout
        lanes = T.ramp(0, 1, v.lanes)
        rows = [T.bind(self.operands.x_row(row + i)) for i in range(m)]

        def registers(dtype: str) -> list[list[Buffer]]:
            return [
                [T.alloc_buffer((v.lanes,), dtype) for _ in range(lay.vectors)] for _ in range(m)
            ]

        sums = [registers("int32") for _ in range(lay.row_codes.planes)]
        acc = registers("float32")

        def real(i: int, j: int) -> Expr:
            return integers.joined(v, [plane[i][j][lanes] for plane in sums])

        if lay.blocks == 1:
            self._integers(sums, rows, group, tile, 0, fetch)
            scales = self._scales(group, tile, 0)
            offsets = self._offsets(group, tile, 0)
            for i, r in enumerate(rows):
                factor = v.splat(T.bind(self.operands.x_scales[r, 0]))
                for j, scale in enumerate(scales):
                    T.buffer_store(acc[i][j], real(i, j) * (scale * factor), [lanes])
                self._subtract(acc[i], offsets, r, 0)
        else:
            for each in acc:
                for a in each:
                    T.buffer_store(a, v.splat(0.0), [lanes])
            with T.serial(0, lay.blocks) as block:
                self._integers(sums, rows, group, tile, block, fetch)
                scales = self._scales(group, tile, block)
                offsets = self._offsets(group, tile, block)
                for i, r in enumerate(rows):
                    factor = v.splat(T.bind(self.operands.x_scales[r, block]))
                    for j, scale in enumerate(scales):
                        scaled = T.bind(real(i, j) * factor)
                        added = v.fma(scaled, scale, acc[i][j][lanes])
                        T.buffer_store(acc[i][j], added, [lanes])
                    self._subtract(acc[i], offsets, r, block)
        self._finish(acc, row, m, group, tile)

    def _integers(
        self,
        acc: list[list[list[Buffer]]],
        rows: list[Expr],
        group: Expr,
        tile: Expr,
        block: Expr | int,
        fetch: Fetch | None,
    ) -> None:
        """acc[plane][i][j] = the integer sums of one block."""
        v, lay, ops = self.vector, self.layout, self.operands
        lanes = T.ramp(0, 1, v.lanes)
        zeros = self._zeros(group, tile, block)
        targets = [
            (row_acc, r, plane)
            for plane, every in enumerate(acc)
            for row_acc, r in zip(every, rows, strict=True)
        ]
        for row_acc, r, plane in targets:
            total = T.bind(ops.sums[r, plane * lay.blocks + block])
            for j in range(lay.vectors):
                start = T.broadcast(T.int32(0), v.lanes) - zeros[j] * T.broadcast(total, v.lanes)
                T.buffer_store(row_acc[j], start, [lanes])
        quads, units = lay.unit_codes // 4, lay.depth_block // lay.unit
        with T.serial(0, units) as step:
            unit = T.bind(block * units + step)
            words = [T.bind(unit * lay.unit + i) for i in range(lay.unit)]
            if fetch is not None:
                for word in words:
                    fetch(word)
            columns = [T.ramp(j * v.lanes, 1, v.lanes) for j in range(lay.vectors)]
            codes = [self._codes([ops.w[group, tile, w, lane] for w in words]) for lane in columns]
            for row_acc, r, plane in targets:
                at = plane * lay.x_words + unit * quads
                x = [T.bind(T.broadcast(ops.x[r, at + q], v.lanes)) for q in range(quads)]
                for j in range(lay.vectors):
                    dot_sum = dots(v, lay.way, row_acc[j][lanes], codes[j], x)
                    T.buffer_store(row_acc[j], dot_sum, [lanes])

    def _codes(self, words: list[Expr]) -> list[Expr]:
        """The operands of `dots`: bytes, four to a lane, for each quad of a unit of words."""
        v, format = self.vector, self.layout.spec.format
        quads = unpacked(v, [T.bind(word) for word in words], format.bits)
        if self._less:
            return [integers.minus_128(v, quad) for quad in quads]
        return [integers.e2m1(v, quad) for quad in quads] if format.kind == "mxfp4" else quads

    def _scales(self, group: Expr, tile: Expr, block: Expr | int) -> list[Expr]:
        v, lay, scales = self.vector, self.layout, self.operands.w_scales
        starts = [j * v.lanes for j in range(lay.vectors)]
        if lay.scale_dtype != "uint8":
            return [v.load(scales, [group, tile, block, start]) for start in starts]
        # An exponent becomes the upper bits of a float32; codes of e2m1 are twice their values.
        half = T.broadcast(T.float32(0.5), v.lanes)
        exponents = [
            T.cast(scales[group, tile, block, T.ramp(start, 1, v.lanes)], f"int32x{v.lanes}")
            for start in starts
        ]
        bits = [T.shift_left(e, T.broadcast(T.int32(23), v.lanes)) for e in exponents]
        return [T.bind(T.reinterpret(v.dtype, b) * half) for b in bits]

    def _offsets(self, group: Expr, tile: Expr, block: Expr | int) -> list[Expr]:
        """Zeros that are floats, for each vector of columns."""
        v, lay, zeros = self.vector, self.layout, self.operands.zeros
        if zeros is None or not lay.spec.format.float_zeros:
            return []
        return [v.load(zeros, [group, tile, block, j * v.lanes]) for j in range(lay.vectors)]

    def _subtract(
        self, acc: list[Buffer], offsets: list[Expr], row: Expr, block: Expr | int
    ) -> None:
        """Adds the sum of a block of a row times -offset."""
        if not offsets:
            return
        v, lay, ops = self.vector, self.layout, self.operands
        lanes = T.ramp(0, 1, v.lanes)
        sums = [
            T.cast(ops.sums[row, plane * lay.blocks + block], "float32")
            for plane in range(lay.row_codes.planes)
        ]
        total = sums[0] if len(sums) == 1 else sums[0] * T.float32(256) + sums[1]
        less = v.splat(T.bind(total * ops.x_scales[row, block] * T.float32(-1)))
        for a, offset in zip(acc, offsets, strict=True):
            T.buffer_store(a, v.fma(offset, less, a[lanes]), [lanes])

    def _zeros(self, group: Expr, tile: Expr, block: Expr | int) -> list[Expr]:
        v, lay, zeros = self.vector, self.layout, self.operands.zeros
        format = lay.spec.format
        if format.float_zeros:
            return [T.broadcast(T.int32(-self._less), v.lanes)] * lay.vectors
        if zeros is None:
            zero = E2M1_ZERO if format.kind == "mxfp4" else 2 ** (format.bits - 1)
            return [T.broadcast(T.int32(zero - self._less), v.lanes)] * lay.vectors
        at = [T.ramp(j * v.lanes, 1, v.lanes) for j in range(lay.vectors)]
        stored = [T.cast(zeros[group, tile, block, lane], f"int32x{v.lanes}") for lane in at]
        return [T.bind(zero - T.broadcast(T.int32(self._less), v.lanes)) for zero in stored]

    @property
    def _less(self) -> int:
        """The number subtracted from both codes and zeros, which does not change differences."""
        lay = self.layout
        return 128 if lay.target.int8_signed and lay.spec.format.kind == "int8" else 0
