"""The assignment of tiles to persistent blocks; each tile has rows of one expert.

    ends[e]      the rows of e are ends[e-1] .. ends[e]; it stays on the device
    block b      tiles b, b + blocks, b + 2 blocks, ...; columns run faster than rows. Large ones
                 of 16 bits are in groups of 8 tiles of rows, within which rows run faster: blocks
                 that run at once read few rows and few columns, which stay in the L2 cache

The grid size depends only on the GPU, so the launch is the same for every routing and can be
captured in a CUDA graph. An expert without rows has no tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.instructions import barrier, each, running_sums


@dataclass(frozen=True)
class TileShape:
    """The product that one block computes at once: [rows, depth] @ [columns, depth]^T, with
    `stages` of them in shared memory, and its warps in a grid. `depth` counts elements of 16
    bits."""

    rows: int
    columns: int
    depth: int
    warp_rows: int
    warp_columns: int
    stages: int

    def __post_init__(self) -> None:
        pieces = self.depth // 8
        if self.depth not in (32, 64):
            raise ValueError(f"a tile is {self.depth} deep: only 32 and 64 are laid out")
        if self.rows % (16 * self.warp_rows) or self.columns % (16 * self.warp_columns):
            raise ValueError("a warp multiplies whole 16x16 tiles")
        if self.rows * pieces % self.threads or self.columns * pieces % self.threads:
            raise ValueError("each thread copies as many 16-byte pieces as every other")
        if self.stages < 2:
            raise ValueError("one stage is loaded while another is multiplied")

    @property
    def threads(self) -> int:
        return self.warp_rows * self.warp_columns * 32

    @property
    def stage(self) -> int:
        """Elements of 16 bits in one stage."""
        return (self.rows + self.columns) * self.depth

    @property
    def shared_memory(self) -> int:
        """Bytes of all stages."""
        return self.stages * self.stage * 2


LARGE = TileShape(128, 128, 32, warp_rows=2, warp_columns=4, stages=4)
"""For 64 rows per expert and more."""
SMALL = TileShape(16, 128, 64, warp_rows=1, warp_columns=4, stages=4)
"""For decoding: a few rows per expert."""
FLOATS = TileShape(128, 64, 32, warp_rows=4, warp_columns=2, stages=3)
"""For float32: 16 of them deep. A thread has 32 sums."""
CODES = TileShape(64, 128, 64, warp_rows=2, warp_columns=4, stages=3)
"""For weights of few bits. A thread keeps each sum twice, unscaled and scaled; both fit into its
registers."""


FEW_ROWS = 32
"""The average number of rows per expert up to which the small tile is used."""


GROUPED = 8
"""Tiles of rows in a group. With 132 SMs, what runs at once reads 8 tiles of x and 17 of w."""


def row_and_column(tile: Expr, rows: Expr, columns: int) -> tuple[Expr, Expr]:
    """The tile of rows and the tile of columns of a tile, out of `rows` times `columns`."""
    group = T.bind(tile // (GROUPED * columns) * GROUPED)
    size = T.bind(T.min(rows - group, GROUPED))
    within = T.bind(tile - group * columns)
    return T.bind(group + within % size), T.bind(T.truncdiv(within, size))


@dataclass(frozen=True)
class ExpertRows:
    """int32: the first row of a tile and the end of its expert's rows. The tile may end before or
    after `end`."""

    expert: Expr
    first: Expr
    end: Expr


@dataclass(frozen=True)
class RowTiles:
    """The number of tiles of `rows` rows of all experts before e, as sums[base + e]."""

    ends: Buffer
    experts: int
    rows: int
    sums: Buffer
    base: int

    @property
    def total(self) -> Expr:
        return self.sums[self.base + self.experts]

    def find(self, tile: Expr) -> ExpertRows:
        """The rows of `tile`, by binary search for the last expert with at most `tile` tiles before
        it."""
        expert = T.alloc_buffer((1,), "int32", scope="local")
        T.buffer_store(expert, 0, [0])
        step = 1 << (self.experts.bit_length() - 1)
        while step:
            with T.If(expert[0] + step < self.experts), T.Then():
                with T.If(self.sums[self.base + expert[0] + step] <= tile), T.Then():
                    T.buffer_store(expert, expert[0] + step, [0])
            step //= 2
        e = T.bind(expert[0])
        start = T.if_then_else(e > 0, self.ends[T.max(e - 1, 0)], 0)
        first = T.bind(start + (tile - self.sums[self.base + e]) * self.rows)
        return ExpertRows(e, first, T.bind(self.ends[e]))


@dataclass(frozen=True)
class OneExpert:
    """Tiles of `rows` rows, where one expert owns all `count` rows."""

    rows: int
    count: Expr

    @property
    def total(self) -> Expr:
        return (self.count + (self.rows - 1)) // self.rows

    def find(self, tile: Expr) -> ExpertRows:
        return ExpertRows(T.int32(0), T.bind(tile * self.rows), self.count)


def row_tiles(ends: Buffer, experts: int, rows: int, threads: int, thread: Expr) -> RowTiles:
    """The tiles of all experts, counted by the block; all threads may read the counts
    afterwards."""
    size = experts + 1
    sums = T.alloc_buffer((2 * size,), "int32", scope="shared")

    def count(e: Expr) -> None:  # of expert e - 1
        before = T.if_then_else(e > 1, ends[T.max(e - 2, 0)], 0)
        owned = ends[T.max(e - 1, 0)] - before
        T.buffer_store(sums, T.if_then_else(e > 0, (owned + (rows - 1)) // rows, 0), [e])

    each(size, threads, thread, count)
    barrier()
    return RowTiles(ends, experts, rows, sums, running_sums(sums, size, threads, thread))
