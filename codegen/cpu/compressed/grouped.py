"""Products of each expert's rows, as 16-bit integers, with the expert's compressed weights, which
are decoded in the kernel.

    y[r, n] = f(sx[r] * (least[n] * A + greatest[n] * B))

A and B are the sums of x under two masks, or are computed from two other sums (weights.py). For
few rows, decoded weights stay in registers. The loads of consecutive entries are independent; only
the start in x of a codeword depends, by one addition, on the codeword before. For many rows, some
columns are decoded to integers in the cache, and all rows are multiplied with them. Sums are of
integers and exact: results do not depend on the path, threads, other rows or target.

(The kernel of QMoE, arXiv 2310.16795, section 4.3, assigns a warp to each row; here the lanes of a
vector take the place of the warp, and a core computes row after row.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu.compressed import weights as compressed_weights
from moec.codegen.cpu.compressed.weights import Weights, dot_pairs, total, zero
from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.product import ProductOutput, TileProduct
from moec.codegen.cpu.gemm.sorted_rows import sorted_product
from moec.codegen.cpu.gemm.tile import ROW_CHUNK, Epilogue, Operands, RowRun, Tile
from moec.codegen.cpu.llvm.masks import LANES
from moec.codegen.cpu.quantised.layout import PAIRS
from moec.codegen.cpu.quantised.round_rows import RoundedRows
from moec.codegen.specs.products import CompressedSpec
from moec.target.cpu import CpuTarget

ROWS = 4
"""The most rows of x that are multiplied with a codeword as it is decoded: registers hold their
sums."""
MANY = 8
"""From this many rows of x on, weights are decoded to the cache first."""
DECODED = 8
"""Columns that are decoded at a time: their integers stay in the L2 cache."""
MANY_ROWS, MANY_COLUMNS = 6, 2
"""The columns of the register tile, with two sums each."""


@dataclass(frozen=True)
class CompressedOperands(Operands):
    """`x` holds pairs of 16-bit integers (quantised/round_rows.py); `w` is not read."""

    x_scales: Buffer
    matrices: tuple[Weights, ...]


@dataclass(frozen=True)
class CompressedTile(Tile):
    """Emits the loops over rows of x, columns and codewords for one tile of columns."""

    operands: CompressedOperands

    @property
    def tiles_at_once(self) -> int:
        return 1

    def rows(self, run: RowRun) -> None:
        """As Tile.rows, without prefetching: the address of the `following` weights is known only
        once these are decoded."""
        group, tile, first, count, _, _ = run
        with T.If(count < MANY):
            with T.Then():
                self._groups(
                    first, count, self._rows, lambda row, m: self._few(group, tile, row, m)
                )
            with T.Else(), T.serial(0, T.truncdiv(count + (ROW_CHUNK - 1), ROW_CHUNK)) as chunk:
                base = T.bind(first + chunk * ROW_CHUNK)
                chunk_rows = T.bind(T.min(first + count - base, T.int64(ROW_CHUNK)))
                self._many(group, tile, base, chunk_rows)

    def _groups(
        self, first: Expr, count: Expr, most: int, action: Callable[[Expr, int], None]
    ) -> None:
        """`action(row, m)` for groups of `most` rows, and for the remaining rows."""
        with T.serial(0, T.truncdiv(count, T.int64(most))) as i:
            action(T.bind(first + i * most), most)
        left = T.bind(T.truncmod(count, T.int64(most)))
        for m in range(1, most):
            with T.If(left == m), T.Then():
                action(T.bind(first + count - m), m)

    @property
    def _rows(self) -> int:
        """The number of rows whose sums fill half of the registers; factors need others."""
        target, turns = self.layout.target, self.operands.matrices[0].turns
        registers = 2 * turns * (LANES // target.vector_lanes)
        return max(1, min(ROWS, target.vector_registers // 2 // registers))

    def _columns(self, tile: Expr) -> Expr:
        lay = self.layout
        return T.bind(T.min(lay.spec.n - tile * lay.width, T.int64(lay.width)))

    def _store_sums(
        self,
        matrix: Weights,
        group: Expr,
        column: Expr,
        rows: Sequence[Expr],
        sums: Sequence[tuple[Expr, Expr]],
        out: Buffer,
        indices: Sequence[Sequence[Expr | int]],
    ) -> None:
        """out[index] = the product of each row, from its two sums."""
        ops, v = self.operands, self.vector
        p, q = (v.scalar(matrix.grid, [group, column, side]) for side in range(2))
        for row, (a, b), index in zip(rows, sums, indices, strict=True):
            value = matrix.value(p, q, a, b)
            T.buffer_store(out, value * ops.x_scales[row, 0], list(index))

    def _few(self, group: Expr, tile: Expr, row: Expr, m: int) -> None:
        """`m` rows from `row` on: each codeword is decoded once for all of them."""
        lay, ops = self.layout, self.operands
        rows = [T.bind(ops.x_row(row + i)) for i in range(m)]
        products = T.alloc_buffer((m, lay.columns), "float32")
        for half, matrix in enumerate(ops.matrices):
            cursor = matrix.cursor(lay.spec.n, group, T.bind(tile * lay.width))
            with T.serial(0, self._columns(tile)) as c:
                column = T.bind(tile * lay.width + c)
                sums = self._masked(matrix, group, column, cursor, rows)
                indices = [(i, half * lay.width + c) for i in range(m)]
                self._store_sums(matrix, group, column, rows, sums, products, indices)
        self._finish_kept(lambda i, column: (products, [i, column]), row, m, group, tile)

    def _masked(
        self, matrix: Weights, group: Expr, column: Expr, cursor: Any, rows: Sequence[Expr]
    ) -> list[tuple[Expr, Expr]]:
        """For each row of x, its sums under the two factors of a row of weights."""
        v, every = self.vector, T.ramp(0, 1, LANES)
        acc = [
            [[T.alloc_buffer((LANES,), "int32") for _ in range(2)] for _ in rows]
            for _ in range(matrix.turns)
        ]
        for buffer in (b for by_row in acc for sides in by_row for b in sides):
            zero(buffer)

        def take(turn: int, word: Expr, *pair: Expr) -> None:
            for i, row in enumerate(rows):
                where = T.address_of(self.operands.x[row, word])
                for buffer, factor in zip(acc[turn][i], pair, strict=True):
                    T.buffer_store(buffer, matrix.add(v, buffer[every], where, factor), [every])

        matrix.each(self.layout.spec.n, group, column, cursor, take)

        def total_of(i: int, side: int) -> Expr:
            added = acc[0][i][side][every]
            for turn in range(1, matrix.turns):
                added = added + acc[turn][i][side][every]
            return total(v, added)

        return [(total_of(i, 0), total_of(i, 1)) for i in range(len(rows))]

    def _many(self, group: Expr, tile: Expr, base: Expr, count: Expr) -> None:
        """At most ROW_CHUNK rows from `base` on: DECODED columns are decoded at a time and
        multiplied with all rows."""
        v, lay, ops = self.vector, self.layout, self.operands
        products = T.alloc_buffer((ROW_CHUNK, lay.columns), "float32")
        decoded = T.alloc_buffer((2, DECODED, PAIRS.words(lay.spec.k)), "int32")
        last = T.bind(self._columns(tile) - 1)
        for half, matrix in enumerate(ops.matrices):
            with T.serial(0, T.truncdiv(last, DECODED) + 1) as block:

                def column_of(c: Expr, block: Expr = block) -> Expr:
                    """Column c of the block, or the last one if the tile has fewer."""
                    return T.bind(T.min(block * DECODED + c, last))

                with T.serial(0, DECODED) as c:

                    def write(
                        turn: int, word: Expr, *pair: Expr, c: Expr = c, matrix: Weights = matrix
                    ) -> None:
                        for side, factor in enumerate(pair):
                            matrix.expand(v, T.address_of(decoded[side, c, word]), factor)

                    column = T.bind(tile * lay.width + column_of(c))
                    cursor = matrix.cursor(lay.spec.n, group, column)
                    matrix.each(lay.spec.n, group, column, cursor, write)

                def meet(
                    row: Expr,
                    m: int,
                    half: int = half,
                    matrix: Weights = matrix,
                    column_of: Any = column_of,
                ) -> None:
                    rows = [T.bind(ops.x_row(row + i)) for i in range(m)]
                    with T.serial(0, DECODED // MANY_COLUMNS) as q:
                        all_sums = self._products(rows, decoded, q * MANY_COLUMNS)
                        for j, sums in enumerate(all_sums):
                            at = column_of(q * MANY_COLUMNS + j)
                            column = T.bind(tile * lay.width + at)
                            indices = [(row - base + i, half * lay.width + at) for i in range(m)]
                            self._store_sums(matrix, group, column, rows, sums, products, indices)

                self._groups(base, count, MANY_ROWS, meet)
        self._finish_kept(lambda i, column: (products, [i, column]), base, count, group, tile)

    def _products(
        self, rows: Sequence[Expr], decoded: Buffer, first: Expr
    ) -> list[list[tuple[Expr, Expr]]]:
        """For some decoded columns from `first` on, for each row of x, its two sums."""
        v, every, x = self.vector, T.ramp(0, 1, LANES), self.operands.x
        acc = [
            [[T.alloc_buffer((LANES,), "int32") for _ in range(2)] for _ in rows]
            for _ in range(MANY_COLUMNS)
        ]
        for buffer in (b for by_row in acc for sides in by_row for b in sides):
            zero(buffer)
        with T.serial(0, -(-self.layout.spec.k // (2 * LANES))) as step:
            at = T.ramp(step * LANES, 1, LANES)
            parts = [T.bind(x[row, at]) for row in rows]
            for j in range(MANY_COLUMNS):
                for side in range(2):
                    w = T.bind(decoded[side, first + j, at])
                    for i, part in enumerate(parts):
                        dots = acc[j][i][side]
                        T.buffer_store(dots, dot_pairs(v, dots[every], part, w), [every])
        return [[(total(v, a[every]), total(v, b[every])) for a, b in column] for column in acc]


def compressed_linear(
    target: CpuTarget,
    spec: CompressedSpec,
    top_k: int = 0,
    epilogue: Epilogue | None = None,
    scale_dtype: str | None = None,
    name: str = "compressed",
) -> PrimFunc:
    """A kernel (codes, scales, sums of x[T, k][, order i32[R]], ends i32[E][, the dictionary],
    the parts of one stack or two[, bias packed][, scale[T, top_k]], y[R, n]), as documented in
    `sorted_product`. The dictionary is compressed_weights.table.
    """
    if spec.gated and epilogue is None:
        raise ValueError(f"{name}: gate and up need an epilogue that joins them")
    lay = Layout(spec, target)

    def tile(x: RoundedRows, matrices: tuple[Weights, ...], out: ProductOutput) -> Tile:
        operands = CompressedOperands(x.codes, x.codes, *out, x.scales, matrices)
        return CompressedTile(lay, operands, epilogue)

    product = TileProduct(
        lay,
        lambda rows: RoundedRows.of(rows, spec.k, form=PAIRS),
        lambda suffix, groups: compressed_weights.weights(spec, target),
        tile,
    )
    return sorted_product(product, name, top_k, scale_dtype)
