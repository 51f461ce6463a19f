"""A tile of a product by mma.sync: stages by cp.async, fragments by ldmatrix. For sm_80 and later.

A stage holds x[rows, depth], then w[columns, depth]; stages.py describes its layout. A fragment of
16x16 elements of 16 bits and one of 16x8 float32 have the same bytes in the same lanes (PTX ISA,
ldmatrix and mma.m16n8k8), so that TF32 needs another instruction alone.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.gemm.gemv import row_of_x
from moec.codegen.cuda.gemm.product import Product
from moec.codegen.cuda.gemm.stages import PIECE, Part, Stages, elements, halves
from moec.codegen.cuda.gemm.tiles import ExpertRows, TileShape
from moec.codegen.cuda.instructions import load_fragments, multiply, round_to_tf32


@dataclass(frozen=True)
class MmaTile:
    """The stages of one block in shared memory, and the sums and fragments of one thread."""

    shape: TileShape
    dtype: str
    thread: Expr
    stages: Stages
    sums: Buffer
    a: Buffer
    b: Buffer
    first_row: Expr  # of this warp within the tile
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
        """The index of the first of two neighbouring sums, in row `half` * 8 + lane / 4, column
        lane % 4 * 2."""
        return (row_fragment * self.column_fragments + column_fragment) * 4 + half * 2

    def clear(self, sums: Buffer) -> None:
        for i in range(self.row_fragments * self.column_fragments * 4):
            T.buffer_store(sums, T.float32(0), [i])

    def compute(self, x: Part, w: Part) -> None:
        """Computes sums = x @ w^T. No thread reads the stages after it returns."""
        self.clear(self.sums)
        self.stages.run([x, w], lambda base, step: self._multiply(base))

    def _multiply(self, base: Expr) -> None:
        depth = self.shape.depth
        for k in range(depth // 16):
            self.load_rows(base, k)
            self._load_columns(base + self.shape.rows * depth, k)
            self.multiply()

    def load_rows(self, base: Expr, k: int) -> None:
        """Loads into a the k-th 16 columns of x, for all rows of this warp."""
        lane = self.lane
        for t in range(self.row_fragments):
            row = T.bind(self.first_row + t * 16 + lane % 16)
            at = self.stages.offset(row, T.bind(k * 2 + lane // 16), self.shape.depth)
            load_fragments([self.a[t * 4 + i] for i in range(4)], self.stages.pointer(base + at))
        self._round(self.a)

    def _load_columns(self, base: Expr, k: int) -> None:
        lane = self.lane
        for t in range(self.column_fragments // 2):
            row = T.bind(self.first_column + t * 16 + lane // 16 * 8 + lane % 8)
            at = self.stages.offset(row, T.bind(k * 2 + lane // 8 % 2), self.shape.depth)
            load_fragments([self.b[t * 4 + i] for i in range(4)], self.stages.pointer(base + at))
        self._round(self.b)

    def _round(self, fragments: Buffer) -> None:
        if self.dtype == "float32":
            for i in range(int(fragments.shape[0])):
                round_to_tf32(fragments[i])

    def multiply(self) -> None:
        """sums += a @ b^T."""
        for t, u in itertools.product(range(self.row_fragments), range(self.column_fragments)):
            multiply(
                self.dtype,
                [self.sums[self.sum_index(t, u, 0) + i] for i in range(4)],
                [self.a[t * 4 + i] for i in range(4)],
                [self.b[u * 2 + i] for i in range(2)],
            )


def mma_tile(
    shape: TileShape, dtype: str, depth: int, thread: Expr, stage: int | None = None
) -> MmaTile:
    """Allocates the buffers of a block that multiplies matrices of `depth` columns. `stage` is the
    size of a stage in elements of 16 bits; the default is `shape.stage`, which suits weights of 16
    bits or float32."""
    rows, columns = shape.rows // shape.warp_rows, shape.columns // shape.warp_columns
    warp = T.bind(thread // 32)
    size = shape.stage if stage is None else stage
    count = shape.stages * size // halves(dtype, 1)
    buffer = T.alloc_buffer((count,), dtype, scope="shared.dyn", align=128)
    steps = -(-halves(dtype, depth) // shape.depth)
    return MmaTile(
        shape,
        dtype,
        thread,
        Stages(buffer, shape.stages, size, steps, shape.threads, thread),
        T.alloc_buffer((rows // 16 * (columns // 8) * 4,), "float32", scope="local"),
        T.alloc_buffer((rows // 16 * 4,), "uint32", scope="local"),
        T.alloc_buffer((columns // 8 * 2,), "uint32", scope="local"),
        T.bind(warp // shape.warp_columns * rows),
        T.bind(warp % shape.warp_columns * columns),
    )


def rows_of_copies(shape: TileShape) -> Buffer:
    """int32: the row of x for each copy of this thread."""
    count = len(range(0, shape.rows * shape.depth // PIECE, shape.threads))
    return T.alloc_buffer((count,), "int32", scope="local")


def part_of_x(
    p: Product, tile: MmaTile, owned: ExpertRows, rows: Buffer, planes: int = 1
) -> tuple[Part, ...]:
    """One part per plane; planes are k elements apart in a row of x. Rows beyond the expert's end
    are clamped to its last row: computed but not stored."""
    shape, dtype = tile.shape, str(p.x.dtype)
    for turn, (row, _) in enumerate(tile.stages.pieces(shape.rows, shape.depth)):
        T.buffer_store(rows, row_of_x(p, owned, row), [turn])

    def part(start: int) -> Part:
        def pointer(turn: int, column: Expr) -> Expr:
            k = elements(dtype, column)
            # rows * k may exceed 32 bits.
            return p.x.ptr_to([T.cast(rows[turn], "int64"), k + start if start else k])

        return Part(shape.rows, shape.depth, halves(dtype, p.spec.k), pointer)

    return tuple(part(plane * p.spec.k) for plane in range(planes))


def part_of_w(p: Product, tile: MmaTile, owned: ExpertRows, column: Expr, width: int = 0) -> Part:
    """Rows of weights. `width` is how many elements of 16 bits of each row a stage holds; 0 means
    the depth of the tile."""
    dtype = str(p.w.dtype)
    expert = T.bind(T.cast(owned.expert, "int64"))  # E * n * k may exceed 32 bits
    width = width or tile.shape.depth
    pieces = tile.stages.pieces(tile.shape.columns, width)

    def pointer(turn: int, k: Expr) -> Expr:
        row = column + pieces[turn][0]
        if p.columns % tile.shape.columns:
            row = T.min(row, p.columns - 1)
        return p.w.ptr_to([expert, row, elements(dtype, k)])

    return Part(tile.shape.columns, width, halves(dtype, int(p.w.shape[2])), pointer)
