"""The register tile on AMX: up to 64 rows of x times the columns of a tile of packed bf16 weights.

    sums[16 r .. , 16 j ..] += x[16 rows of block r, 32 of K] @ w[32 of K, 16 of vector j]

A register holds 16 steps of one vector as they lie in memory, and while it is there, up to four
blocks of rows use it: weights are read once, as one stream, for as many rows as a token's
experts usually have. Rows that do not lie side by side, and the last ones of a run, are first
copied to a panel. Any number of rows goes this way: every element of y is summed by the same
instructions, whatever is beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.layout import Layout
from moec.codegen.cpu.tile import Epilogue, Operands, Tile
from moec.codegen.cpu.tile_intrinsics import SUMS, TILE_BYTES, TILE_ROWS

STEPS = TILE_ROWS  # steps of K, each a pair, that one register holds
BLOCKS = SUMS  # blocks of rows whose sums are in registers
MOST_ROWS = BLOCKS * TILE_ROWS
_WEIGHTS = SUMS  # the register of weights; the three behind it take turns for blocks of rows
_TURNS = 3


def tile_for(layout: Layout, operands: Operands, epilogue: Epilogue | None) -> Tile:
    """The loops for a tile of columns that the target is best at."""
    kind = AmxTile if layout.amx else Tile
    return kind(layout, operands, epilogue)


@dataclass(frozen=True)
class AmxTile(Tile):
    """Emits the loops over rows and K for some tiles of columns."""

    @property
    def row_chunk(self) -> int:
        """Rows that stay in half of the second-level cache while tiles of weights pass by."""
        fit = self.layout.target.l2 // 2 // (self.layout.spec.k * 2)
        return max(1, fit // MOST_ROWS) * MOST_ROWS

    @property
    def tiles_at_once(self) -> int:
        """Copies of rows are made for several tiles, where enough is left to share out."""
        lay = self.layout
        return min(4, lay.tiles) if lay.tiles * lay.spec.groups >= 256 else 1

    def rows(
        self,
        group: Expr,
        tile: Expr,
        first: Expr,
        count: Expr,
        following: tuple[Expr, Expr] | None = None,
        tiles: Expr | int = 1,
    ) -> None:
        v, lay = self.vector, self.layout
        panel = v.scratch((BLOCKS, lay.depth // STEPS, TILE_ROWS, STEPS), "int32")
        sums = v.scratch((MOST_ROWS, lay.columns), "float32")
        v.tiles("begin")
        with T.serial(0, T.truncdiv(count + (MOST_ROWS - 1), T.int64(MOST_ROWS))) as part:
            row = T.bind(first + part * MOST_ROWS)
            m = T.bind(T.min(first + count - row, T.int64(MOST_ROWS)))
            lying = T.bind(T.int64(0) if self.operands.gathered else m - T.truncmod(m, 16))
            self._copy(row, lying, m, panel)
            with T.serial(0, tiles) as t:
                some = T.bind(tile + t)
                for blocks in range(1, BLOCKS + 1):
                    fits = T.truncdiv(m + (TILE_ROWS - 1), T.int64(TILE_ROWS)) == blocks
                    with T.If(fits), T.Then(), T.serial(0, lay.vectors) as j:
                        self._products(group, some, j, row, blocks, lying, panel, sums)
                with T.serial(0, m) as i:
                    made = [sums[i, T.ramp(j * v.lanes, 1, v.lanes)] for j in range(lay.vectors)]
                    self._finish_row(made, T.bind(row + i), group, some)
        v.tiles("end")

    def _copy(self, row: Expr, lying: Expr, m: Expr, panel: Buffer) -> None:
        """The rows from `lying` on; what is behind `m` reaches only sums that nobody reads."""
        v, lay, ops = self.vector, self.layout, self.operands
        with T.serial(lying, m) as i:
            source = T.bind(ops.x_row(row + i))
            block, at = T.truncdiv(i, TILE_ROWS), T.truncmod(i, TILE_ROWS)
            with T.serial(0, lay.depth // STEPS) as step:
                v.copy_line(panel[block, step, at, 0], ops.x[source, step * 2 * STEPS])

    def _products(
        self,
        group: Expr,
        tile: Expr,
        j: Expr,
        row: Expr,
        blocks: int,
        lying: Expr,
        panel: Buffer,
        sums: Buffer,
    ) -> None:
        """sums[:, vector j] of all rows."""
        v, lay, ops = self.vector, self.layout, self.operands
        stream = T.bind(tile * lay.vectors + j)
        for b in range(blocks):
            v.tile_zero(b)
        with T.serial(0, lay.depth // STEPS) as step:
            v.tile_load(_WEIGHTS, ops.w[group, stream, step * STEPS, 0], TILE_BYTES)
            for b in range(blocks):
                rows = _WEIGHTS + 1 + b % _TURNS
                copied = panel[b, step, 0, 0]
                if ops.gathered:
                    v.tile_load(rows, copied, TILE_BYTES)
                else:
                    there = ops.x[row + b * TILE_ROWS, step * 2 * STEPS]
                    whole = T.Cast("int32", (b + 1) * TILE_ROWS <= lying)
                    v.tile_load_either(rows, whole, there, lay.spec.k * 2, copied, TILE_BYTES)
                v.tile_bf16(b, rows, _WEIGHTS)
        for b in range(blocks):
            v.tile_store(b, sums[b * TILE_ROWS, j * v.lanes], lay.columns * 4)
