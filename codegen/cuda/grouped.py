"""Products of each expert's rows with that expert's weights; rows lie sorted by expert.

    y[r] = f(x[row of r] @ w[e]^T + bias[e])        for ends[e-1] <= r < ends[e]

A dense product (`linear`) is that of one expert that owns all rows. "row of r" is r itself, or,
where the dispatch is folded in (`top_k`), the token order[r] // top_k: then the rows of x are read
where they are and never copied. Rows of y that no expert owns are left as they are. Gated weights
lie interleaved: see layout.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cuda.activation import Epilogue
from moec.codegen.cuda.gemv import ROWS, launch_few_rows
from moec.codegen.cuda.mma_tile import MmaTile, Source, mma_tile
from moec.codegen.cuda.product import (
    Product,
    arguments,
    check_product,
    dense_arguments,
    store_row,
    tiles_of,
)
from moec.codegen.cuda.tiles import FEW_ROWS, LARGE, SMALL, ExpertRows, TileShape
from moec.codegen.specs.products import LinearSpec
from moec.target.cuda import CudaTarget


def grouped_linear(
    spec: LinearSpec,
    target: CudaTarget,
    *,
    epilogue: Epilogue | None = None,
    top_k: int = 0,
    shape: TileShape | None = None,
    blocks: int = 0,
    name: str = "grouped",
) -> PrimFunc:
    """A kernel (x[R or T, k][, order i32[R]], ends i32[E], w packed[, bias packed], y[R, n]).

    With `top_k` it takes `order`. `shape` is the tile: None for one that the number of rows
    decides at the launch; for few rows that is no tile, but what gemv.py says. `blocks` is the
    grid: 0 for at most one block on each SM.
    Raises NoMatch for what the tile cannot do.
    """
    shapes = (SMALL, LARGE) if shape is None else (shape,)
    for one in shapes:
        check_product(spec, target, epilogue, one.shared_memory)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tir.noalias": True})
            _launched(arguments(spec, epilogue, top_k), target, shapes, blocks)
    return builder.get()


def linear(
    spec: LinearSpec, target: CudaTarget, *, shape: TileShape | None = None, name: str = "linear"
) -> PrimFunc:
    """A kernel (x[R, k], w[n, k][, bias[n]], y[R, n]): all rows are those of one expert."""
    shapes = (SMALL, LARGE) if shape is None else (shape,)
    for one in shapes:
        check_product(spec, target, None, one.shared_memory)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tir.noalias": True})
            _launched(dense_arguments(spec), target, shapes, 0)
    return builder.get()


def _launched(p: Product, target: CudaTarget, shapes: Sequence[TileShape], blocks: int) -> None:
    """The tile by the rows that an expert has on average: the host decides."""
    if len(shapes) == 1:
        _launch(p, target, shapes[0], blocks)
        return
    small, large = shapes
    with T.If(p.rows <= max(p.spec.groups, ROWS)):
        with T.Then():
            launch_few_rows(p, target, blocks)
        with T.Else(), T.If(p.rows <= FEW_ROWS * p.spec.groups):
            with T.Then():
                _launch(p, target, small, blocks)
            with T.Else():
                _launch(p, target, large, blocks)


def _launch(p: Product, target: CudaTarget, shape: TileShape, blocks: int) -> None:
    across = -(-p.columns // shape.columns)
    # No routing has more tiles than this: whole ones, and a last one of each expert.
    tiles = ((p.rows + (shape.rows - 1)) // shape.rows + (p.spec.groups - 1)) * across
    count = T.min(T.max(tiles, 1), target.sms) if not blocks else blocks
    grid = T.launch_thread("blockIdx.x", count)
    with grid as block, T.launch_thread("threadIdx.x", shape.threads) as thread:
        _tiles(p, shape, count, block, thread)


def _tiles(p: Product, shape: TileShape, blocks: int | Expr, block: Expr, thread: Expr) -> None:
    tile = mma_tile(shape, p.spec.dtype, p.spec.k, thread)
    word = T.alloc_buffer((1,), "uint32", scope="local")
    rows = T.alloc_buffer(
        (len(range(0, shape.rows * shape.depth // 8, shape.threads)),), "int32", scope="local"
    )
    tiles = tiles_of(p, shape.rows, shape.threads, thread)
    across = -(-p.columns // shape.columns)
    with T.serial(0, (tiles.total * across - block + (blocks - 1)) // blocks) as turn:
        index = T.bind(block + turn * blocks)
        owned = tiles.find(index // across)
        column = T.bind(index % across * shape.columns)
        tile.compute(_rows_of_x(p, tile, owned, rows), _rows_of_w(p, tile, owned, column))
        _store(p, tile, owned, column, word)


def _rows_of_x(p: Product, tile: MmaTile, owned: ExpertRows, rows: Buffer) -> Source:
    """Those behind the end are the last one again: read, and not stored."""
    for turn, (row, _) in enumerate(tile.pieces(tile.shape.rows)):
        r = T.bind(T.min(owned.first + row, owned.end - 1))
        T.buffer_store(rows, r if p.order is None else p.order[r] // p.top_k, [turn])
    # 32 bits do not hold rows * k.
    return Source(
        tile.shape.rows,
        lambda turn, column: p.x.ptr_to([T.cast(rows[turn], "int64"), column]),
    )


def _rows_of_w(p: Product, tile: MmaTile, owned: ExpertRows, column: Expr) -> Source:
    expert = T.bind(T.cast(owned.expert, "int64"))  # 32 bits do not hold E * n * k
    pieces = tile.pieces(tile.shape.columns)

    def pointer(turn: int, k: Expr) -> Expr:
        row = column + pieces[turn][0]
        if p.columns % tile.shape.columns:
            row = T.min(row, p.columns - 1)
        return p.w.ptr_to([expert, row, k])

    return Source(tile.shape.columns, pointer)


def _store(p: Product, tile: MmaTile, owned: ExpertRows, column: Expr, word: Buffer) -> None:
    first = T.bind(column + tile.first_column + tile.lane % 4 * 2)
    for t in range(tile.row_fragments):
        for half in range(2):
            row = T.bind(owned.first + tile.first_row + t * 16 + half * 8 + tile.lane // 4)
            at = [tile.sum_index(t, u, half) for u in range(tile.column_fragments)]
            fragments = [(tile.sums[i], tile.sums[i + 1]) for i in at]
            store_row(p, tile.shape.columns, owned, row, first, fragments, word)
