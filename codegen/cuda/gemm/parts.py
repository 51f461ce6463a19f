"""The rows of x and of w that a tile multiplies, as parts of its stages."""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.gemm.gemv import row_of_x
from moec.codegen.cuda.gemm.mma_tile import MmaTile
from moec.codegen.cuda.gemm.product import Product
from moec.codegen.cuda.gemm.stages import PIECE, Part, elements, halves
from moec.codegen.cuda.gemm.tiles import ExpertRows, TileShape


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
