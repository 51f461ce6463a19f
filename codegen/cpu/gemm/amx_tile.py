"""The register tile on AMX: 32 rows of x times two vectors of columns of packed bf16 weights.

    sums[16 rows of block b, vector j] += x[16 rows, 32 of K] @ w[32 of K, 16 of vector j]

A register holds 16 consecutive steps of one vector. Up to 64 rows are computed together, so that
the weights of two vectors are in the cache for the second 32 rows. Rows that are not contiguous,
and the last rows of a run, are first copied to a panel. This path is used for any number of rows,
so that every element of y is summed by the same instructions, whatever rows are beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.gemm.row_blocks import ceildiv
from moec.codegen.cpu.gemm.tile import RowRun, Tile
from moec.codegen.cpu.llvm.amx import SUMS, TILE_BYTES, TILE_ROWS

STEPS = TILE_ROWS  # steps of K, each a pair, that one register holds
BLOCKS = 2  # blocks of rows, and vectors, whose sums are in registers
PANEL_BLOCKS = 4
MOST_ROWS = PANEL_BLOCKS * TILE_ROWS
_ROWS, _WEIGHTS = SUMS, SUMS + BLOCKS  # the first register of rows, and of weights


@dataclass(frozen=True)
class DepthSteps:
    """Steps `first` .. `first + count` of K, each of a register; `weights(j, step)` is where those
    of vector j are, for a step counted from the first, and the bytes between its rows."""

    first: Expr | int
    count: int
    weights: Callable[[int, Expr], tuple[Expr, int]]


@dataclass(frozen=True)
class AmxRows:
    """`count` rows of y from `first` on, in `blocks` of TILE_ROWS. Those before block `lying` are
    contiguous in x and read there; the others are copied to `panel`."""

    first: Expr
    count: Expr
    blocks: Expr
    lying: Expr
    panel: Buffer


@dataclass(frozen=True)
class AmxTile(Tile):
    """Emits the loops over rows and K for some tiles of columns."""

    @property
    def pair_steps(self) -> int:
        """Registers of pairs along K."""
        return self.layout.spec.k // (2 * STEPS)

    @property
    def row_chunk(self) -> int:
        """Rows that fit half of the L2 cache while tiles of weights are streamed."""
        fit = self.layout.target.l2 // 2 // (self.layout.spec.k * 2)
        return max(1, fit // MOST_ROWS) * MOST_ROWS

    def rows(self, run: RowRun) -> None:
        group, tile, first, count, _, tiles = run
        v, lay = self.vector, self.layout
        panel = self._row_panel()
        sums = v.scratch((MOST_ROWS, lay.columns), "float32")
        v.tiles("begin")
        with T.serial(0, ceildiv(count, MOST_ROWS)) as part:
            row = T.bind(first + part * MOST_ROWS)
            m = T.bind(T.min(first + count - row, T.int64(MOST_ROWS)))
            lying = T.bind(T.int64(0) if self.operands.gathered else T.truncdiv(m, TILE_ROWS))
            blocks = T.bind(ceildiv(m, TILE_ROWS))
            rows = AmxRows(row, m, blocks, lying, panel)
            self._copy(rows)
            with T.serial(0, tiles) as t:
                column_tile = T.bind(tile + t)
                self._tile_sums(rows, group, column_tile, sums)
                with T.serial(0, m) as i:
                    row_sums = [
                        sums[i, T.ramp(j * v.lanes, 1, v.lanes)] for j in range(lay.vectors)
                    ]
                    self._finish_row(row_sums, T.bind(row + i), group, column_tile)
        v.tiles("end")

    def _row_panel(self) -> Buffer:
        shape = (PANEL_BLOCKS, self.pair_steps, TILE_ROWS, STEPS)
        return self.vector.scratch(shape, "int32")

    def _tile_sums(self, rows: AmxRows, group: Expr, tile: Expr, sums: Buffer) -> None:
        """sums[rows, columns of a tile], over all of K."""

        def weights(j: int, step: Expr) -> tuple[Expr, int]:
            at = tile * self.layout.vectors + j
            return self.operands.w[group, at, step * STEPS, 0], TILE_BYTES

        self._sums(rows, DepthSteps(0, self.pair_steps, weights), sums)

    def _sums(self, rows: AmxRows, depth: DepthSteps, sums: Buffer) -> None:
        """sums[rows, columns of a tile], over a part of K."""
        vectors = self.layout.vectors
        for j in range(0, vectors, BLOCKS):
            pair_of = range(j, min(j + BLOCKS, vectors))
            with T.serial(0, ceildiv(rows.blocks, BLOCKS)) as pair:
                block = T.bind(pair * BLOCKS)
                for many in range(1, BLOCKS + 1):
                    with T.If(T.min(rows.blocks - block, T.int64(BLOCKS)) == many), T.Then():
                        self._products(_At(pair_of, block, many), rows, depth, sums)

    def _copy(self, rows: AmxRows) -> None:
        """Copies the blocks of rows that are not read where they are; rows after the last one
        repeat it."""
        v, ops = self.vector, self.operands
        sources = T.alloc_buffer((TILE_ROWS,), "int64")
        with T.serial(rows.lying, rows.blocks) as block:
            with T.serial(0, TILE_ROWS) as i:
                inside = T.min(block * TILE_ROWS + i, rows.count - 1)
                T.buffer_store(sources, ops.x_row(rows.first + inside), [i])
            with T.serial(0, self.pair_steps) as step, T.serial(0, TILE_ROWS) as i:
                v.copy_line(rows.panel[block, step, i, 0], ops.x[sources[i], step * 2 * STEPS])

    def _products(self, at: _At, rows: AmxRows, depth: DepthSteps, sums: Buffer) -> None:
        """sums[rows of some blocks, some vectors], over a part of K."""
        v, lay, ops = self.vector, self.layout, self.operands
        registers = {
            (b, j): b * BLOCKS + i for b in range(at.blocks) for i, j in enumerate(at.vectors)
        }
        for register in registers.values():
            v.tile_zero(register)
        with T.serial(0, depth.count) as inside:
            step = depth.first + inside
            for i, j in enumerate(at.vectors):
                v.tile_load(_WEIGHTS + i, *depth.weights(j, inside))
            for b in range(at.blocks):
                block = at.block + b
                copied = rows.panel[block, step, 0, 0]
                if ops.gathered:
                    v.tile_load(_ROWS + b, copied, TILE_BYTES)
                else:
                    there = ops.x[rows.first + block * TILE_ROWS, step * 2 * STEPS]
                    lies = T.Cast("int32", block < rows.lying)
                    v.tile_load_either(_ROWS + b, lies, there, lay.spec.k * 2, copied, TILE_BYTES)
                for i, j in enumerate(at.vectors):
                    v.tile_bf16(registers[b, j], _ROWS + b, _WEIGHTS + i)
        for (b, j), register in registers.items():
            where = sums[(at.block + b) * TILE_ROWS, j * v.lanes]
            v.tile_store(register, where, lay.columns * 4)


@dataclass(frozen=True)
class _At:
    """The sums to compute: two vectors of a tile, for one or two blocks of rows."""

    vectors: range
    block: Expr  # the first
    blocks: int
