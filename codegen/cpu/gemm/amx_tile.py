"""The register tile on AMX: 32 rows of x times two vectors of columns of packed bf16 weights.

    sums[16 rows of block b, vector j] += x[16 rows, 32 of K] @ w[32 of K, 16 of vector j]

A register holds 16 consecutive steps of one vector. Up to 64 rows are computed together, so that
the weights of two vectors are in the cache for the second 32 rows. Rows that are not contiguous,
and the last rows of a run, are first copied to a panel. This path is used for any number of rows,
so that every element of y is summed by the same instructions, whatever rows are beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.gemm.row_blocks import ceildiv
from moec.codegen.cpu.gemm.tile import Tile
from moec.codegen.cpu.llvm.amx import SUMS, TILE_BYTES, TILE_ROWS

STEPS = TILE_ROWS  # steps of K, each a pair, that one register holds
BLOCKS = 2  # blocks of rows, and vectors, whose sums are in registers
PANEL_BLOCKS = 4
MOST_ROWS = PANEL_BLOCKS * TILE_ROWS
_ROWS, _WEIGHTS = SUMS, SUMS + BLOCKS  # the first register of rows, and of weights


@dataclass(frozen=True)
class AmxTile(Tile):
    """Emits the loops over rows and K for some tiles of columns."""

    @property
    def row_chunk(self) -> int:
        """Rows that fit half of the L2 cache while tiles of weights are streamed."""
        fit = self.layout.target.l2 // 2 // (self.layout.spec.k * 2)
        return max(1, fit // MOST_ROWS) * MOST_ROWS

    def rows(
        self,
        group: Expr,
        tile: Expr,
        first: Expr,
        count: Expr,
        following: tuple[Expr, Expr],
        tiles: Expr | int = 1,
    ) -> None:
        v, lay = self.vector, self.layout
        panel = v.scratch((PANEL_BLOCKS, lay.depth // STEPS, TILE_ROWS, STEPS), "int32")
        sums = v.scratch((MOST_ROWS, lay.columns), "float32")
        v.tiles("begin")
        with T.serial(0, ceildiv(count, MOST_ROWS)) as part:
            row = T.bind(first + part * MOST_ROWS)
            m = T.bind(T.min(first + count - row, T.int64(MOST_ROWS)))
            lying = T.bind(T.int64(0) if self.operands.gathered else T.truncdiv(m, TILE_ROWS))
            blocks = T.bind(ceildiv(m, TILE_ROWS))
            self._copy(row, lying, blocks, m, panel)
            with T.serial(0, tiles) as t:
                column_tile = T.bind(tile + t)
                for j in range(0, lay.vectors, BLOCKS):
                    vectors = range(j, min(j + BLOCKS, lay.vectors))
                    with T.serial(0, ceildiv(blocks, BLOCKS)) as pair:
                        block = T.bind(pair * BLOCKS)
                        for many in range(1, BLOCKS + 1):
                            with T.If(T.min(blocks - block, T.int64(BLOCKS)) == many), T.Then():
                                at = _At(group, column_tile, vectors, row, block, many, lying)
                                self._products(at, panel, sums)
                with T.serial(0, m) as i:
                    row_sums = [
                        sums[i, T.ramp(j * v.lanes, 1, v.lanes)] for j in range(lay.vectors)
                    ]
                    self._finish_row(row_sums, T.bind(row + i), group, column_tile)
        v.tiles("end")

    def _copy(self, row: Expr, first: Expr, end: Expr, m: Expr, panel: Buffer) -> None:
        """Copies the blocks of rows from `first` on; rows after row `m` repeat it."""
        v, lay, ops = self.vector, self.layout, self.operands
        sources = T.alloc_buffer((TILE_ROWS,), "int64")
        with T.serial(first, end) as block:
            with T.serial(0, TILE_ROWS) as i:
                T.buffer_store(sources, ops.x_row(row + T.min(block * TILE_ROWS + i, m - 1)), [i])
            with T.serial(0, lay.depth // STEPS) as step, T.serial(0, TILE_ROWS) as i:
                v.copy_line(panel[block, step, i, 0], ops.x[sources[i], step * 2 * STEPS])

    def _products(self, at: _At, panel: Buffer, sums: Buffer) -> None:
        """sums[rows of some blocks, some vectors], over all of K."""
        v, lay, ops = self.vector, self.layout, self.operands
        registers = {
            (b, j): b * BLOCKS + i for b in range(at.blocks) for i, j in enumerate(at.vectors)
        }
        for register in registers.values():
            v.tile_zero(register)
        with T.serial(0, lay.depth // STEPS) as step:
            for i, j in enumerate(at.vectors):
                weights = ops.w[at.group, at.tile * lay.vectors + j, step * STEPS, 0]
                v.tile_load(_WEIGHTS + i, weights, TILE_BYTES)
            for b in range(at.blocks):
                block = at.block + b
                copied = panel[block, step, 0, 0]
                if ops.gathered:
                    v.tile_load(_ROWS + b, copied, TILE_BYTES)
                else:
                    there = ops.x[at.row + block * TILE_ROWS, step * 2 * STEPS]
                    lies = T.Cast("int32", block < at.lying)
                    v.tile_load_either(_ROWS + b, lies, there, lay.spec.k * 2, copied, TILE_BYTES)
                for i, j in enumerate(at.vectors):
                    v.tile_bf16(registers[b, j], _ROWS + b, _WEIGHTS + i)
        for (b, j), register in registers.items():
            where = sums[(at.block + b) * TILE_ROWS, j * v.lanes]
            v.tile_store(register, where, lay.columns * 4)


@dataclass(frozen=True)
class _At:
    """The sums to compute: two vectors of a tile, for one or two blocks of rows."""

    group: Expr
    tile: Expr
    vectors: range
    row: Expr  # the first of all blocks
    block: Expr  # the first of these
    blocks: int
    lying: Expr  # blocks before this one are contiguous in x and read without a copy
