"""A tile of a product by mma.sync: stages by cp.async, fragments by ldmatrix. sm_80 and later.

    shared memory   stage 0 | stage 1 | ...         each x[rows, depth], then w[columns, depth]
    a row           16-byte pieces, piece p at p ^ key(row): eight rows that ldmatrix reads at
                    once lie in eight different banks

`stages - 1` stages are on their way while one is multiplied. Every thread waits for its copies
before the barrier, so that after it the stage is complete for all; the stage that is loaded next
is the one that all have multiplied before that barrier.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.instructions import (
    barrier,
    commit_copies,
    copy_async,
    load_fragments,
    multiply,
    wait_copies,
)
from moec.codegen.cuda.tiles import TileShape

_PIECE = 8  # elements of 16 bytes


@dataclass(frozen=True)
class Source:
    """Where a row of a stage comes from: pointer(row of the tile, column of the matrix)."""

    rows: int
    pointer: Callable[[int, Expr], Expr]


@dataclass(frozen=True)
class MmaTile:
    """Buffers of one block: stages in shared memory, sums and fragments of a thread."""

    shape: TileShape
    dtype: str
    depth: int  # of the whole product
    thread: Expr
    stages: Buffer
    sums: Buffer
    a: Buffer
    b: Buffer
    first_row: Expr  # of this warp in the tile
    first_column: Expr

    @property
    def row_fragments(self) -> int:
        return self.shape.rows // self.shape.warp_rows // 16

    @property
    def column_fragments(self) -> int:
        return self.shape.columns // self.shape.warp_columns // 8

    @property
    def lane(self) -> Expr:
        return self.thread % 32

    def sum_index(self, row_fragment: int, column_fragment: int, half: int) -> int:
        """Of the first of two neighbours, in row `half` * 8 + lane / 4, column lane % 4 * 2."""
        return (row_fragment * self.column_fragments + column_fragment) * 4 + half * 2

    def pieces(self, rows: int) -> list[tuple[Expr, Expr]]:
        """(row, piece) of each copy of this thread, of a part of a stage."""
        count, threads = self.shape.depth // _PIECE, self.shape.threads
        turns = range(rows * count // threads)
        indices = [T.bind(self.thread + turn * threads) for turn in turns]
        return [(T.bind(i // count), T.bind(i % count)) for i in indices]

    def compute(self, x: Source, w: Source) -> None:
        """sums = x @ w^T. Nobody reads the stages any more when this ends."""
        shape, steps = self.shape, -(-self.depth // self.shape.depth)
        ahead = shape.stages - 1
        for stage in range(ahead):
            if stage < steps:
                self._load(stage, stage, x, w)
            commit_copies()
        for i in range(self.row_fragments * self.column_fragments * 4):
            T.buffer_store(self.sums, T.float32(0), [i])
        with T.serial(0, steps) as step:
            wait_copies(ahead - 1)
            barrier()
            with T.If(step + ahead < steps), T.Then():
                self._load((step + ahead) % shape.stages, step + ahead, x, w)
            commit_copies()  # also where it is empty: waiting counts groups
            self._multiply(T.bind(step % shape.stages * shape.stage))
        wait_copies(0)
        barrier()

    def _load(self, stage: Expr | int, step: Expr | int, x: Source, w: Source) -> None:
        base = stage * self.shape.stage
        for part in (x, w):
            for turn, (row, piece) in enumerate(self.pieces(part.rows)):
                column = step * self.shape.depth + piece * _PIECE
                to = self.stages.ptr_to([base + self._offset(row, piece)])
                if self.depth % self.shape.depth == 0:
                    copy_async(to, part.pointer(turn, column))
                else:
                    inside = T.if_then_else(column < self.depth, T.uint32(16), T.uint32(0))
                    last = T.min(column, self.depth - _PIECE)
                    copy_async(to, part.pointer(turn, last), inside)
            base = base + part.rows * self.shape.depth

    def _multiply(self, base: Expr) -> None:
        lane = self.lane
        for k in range(self.shape.depth // 16):
            for t in range(self.row_fragments):
                row = T.bind(self.first_row + t * 16 + lane % 16)
                at = self._offset(row, T.bind(k * 2 + lane // 16))
                load_fragments(
                    [self.a[t * 4 + i] for i in range(4)], self.stages.ptr_to([base + at])
                )
            w = base + self.shape.rows * self.shape.depth
            for t in range(self.column_fragments // 2):
                row = T.bind(self.first_column + t * 16 + lane // 16 * 8 + lane % 8)
                at = self._offset(row, T.bind(k * 2 + lane // 8 % 2))
                load_fragments([self.b[t * 4 + i] for i in range(4)], self.stages.ptr_to([w + at]))
            for t, u in itertools.product(range(self.row_fragments), range(self.column_fragments)):
                multiply(
                    self.dtype,
                    [self.sums[self.sum_index(t, u, 0) + i] for i in range(4)],
                    [self.a[t * 4 + i] for i in range(4)],
                    [self.b[u * 2 + i] for i in range(2)],
                )

    def _offset(self, row: Expr, piece: Expr) -> Expr:
        """Elements from the start of a part of a stage."""
        wide = self.shape.depth == 64
        key = row % 8 if wide else T.shift_right(row, T.int32(1)) % 4
        return row * self.shape.depth + T.bitwise_xor(piece, key) * _PIECE


def mma_tile(shape: TileShape, dtype: str, depth: int, thread: Expr) -> MmaTile:
    """Allocates the buffers of a block that multiplies matrices of `depth` columns."""
    rows, columns = shape.rows // shape.warp_rows, shape.columns // shape.warp_columns
    warp = T.bind(thread // 32)
    return MmaTile(
        shape,
        dtype,
        depth,
        thread,
        T.alloc_buffer((shape.stages * shape.stage,), dtype, scope="shared.dyn", align=128),
        T.alloc_buffer((rows // 16 * (columns // 8) * 4,), "float32", scope="local"),
        T.alloc_buffer((rows // 16 * 4,), "uint32", scope="local"),
        T.alloc_buffer((columns // 8 * 2,), "uint32", scope="local"),
        T.bind(warp // shape.warp_columns * rows),
        T.bind(warp % shape.warp_columns * columns),
    )
