"""Products of each expert's rows with that expert's weights; rows are sorted by expert.

    y[r] = f(x[row of r] @ w[e]^T + bias[e])        for ends[e-1] <= r < ends[e]

A dense product (`linear`) is a grouped product with one expert that owns all rows. "row of r" is r
itself, or, if the dispatch is fused (`top_k`), the token order[r] // top_k: the rows of x are then
gathered on load, never copied. Rows of y without an expert are not written. Gated weights are
interleaved: see layout.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cuda.activation import Epilogue
from moec.codegen.cuda.gemm.gemv import ROWS, launch_few_rows
from moec.codegen.cuda.gemm.grouped_wgmma import check_wgmma, launch_wgmma
from moec.codegen.cuda.gemm.mma_tile import MmaTile, mma_tile, part_of_w, part_of_x, rows_of_copies
from moec.codegen.cuda.gemm.product import (
    Product,
    arguments,
    check_product,
    dense_arguments,
    store_row,
    tiles_of,
)
from moec.codegen.cuda.gemm.stages import PIECE, Part
from moec.codegen.cuda.gemm.tiles import (
    FEW_ROWS,
    FLOATS,
    LARGE,
    SMALL,
    ExpertRows,
    TileShape,
    row_and_column,
)
from moec.codegen.cuda.instructions import computed_here, fma, kernel, load_shared
from moec.codegen.specs.products import LinearSpec
from moec.errors import NoMatch
from moec.target.cuda import CudaTarget


def shapes_of(dtype: str) -> tuple[TileShape, TileShape]:
    """The tiles for few and for many rows per expert."""
    return SMALL, FLOATS if dtype == "float32" else LARGE


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

    With `top_k` it has the argument `order`. `shape` is the tile. None selects one at launch, by
    the number of rows; for few rows, that is the product of gemv.py. `blocks` is the grid size; 0
    means at most one block per SM.

    Raises NoMatch if the tile does not support the product.
    """
    shapes = shapes_of(spec.dtype) if shape is None else (shape,)
    for one in shapes:
        check_product(spec, target, epilogue, one.shared_memory)
    with kernel(name) as builder:
        _launched(arguments(spec, epilogue, top_k), target, shapes, blocks)
    return builder.get()


def linear(
    spec: LinearSpec,
    target: CudaTarget,
    *,
    shape: TileShape | None = None,
    name: str = "linear",
) -> PrimFunc:
    """A kernel (x[R, k], w[n, k][, bias[n]], y[R, n]) for one expert that owns all rows."""
    shapes = shapes_of(spec.dtype) if shape is None else (shape,)
    for one in shapes:
        check_product(spec, target, None, one.shared_memory)
    with kernel(name) as builder:
        _launched(dense_arguments(spec), target, shapes, 0)
    return builder.get()


def _launched(p: Product, target: CudaTarget, shapes: Sequence[TileShape], blocks: int) -> None:
    by_wgmma = len(shapes) > 1 and _by_wgmma(p, target)

    def tiles(shape: TileShape) -> None:
        if by_wgmma and shape is LARGE:
            launch_wgmma(p, target, blocks)
        else:
            launch_tiles(p, target, shape, blocks, partial(_tiles, p, target, shape))

    if len(shapes) == 1:
        tiles(shapes[0])
        return
    few = partial(launch_few_rows, p, target, blocks)
    by_rows(p, few, *(partial(tiles, shape) for shape in shapes))


def _by_wgmma(p: Product, target: CudaTarget) -> bool:
    try:
        check_wgmma(p.spec, target, p.epilogue)
    except NoMatch:
        return False
    return True


def by_rows(
    p: Product, few: Callable[[], None], small: Callable[[], None], large: Callable[[], None]
) -> None:
    """Emits the host code that selects a launch by the average number of rows per expert."""
    with T.If(p.rows <= max(p.spec.groups, ROWS)):
        with T.Then():
            few()
        with T.Else(), T.If(p.rows <= FEW_ROWS * p.spec.groups):
            with T.Then():
                small()
            with T.Else():
                large()


def launch_tiles(
    p: Product,
    target: CudaTarget,
    shape: TileShape,
    blocks: int,
    compute: Callable[[int | Expr, Expr, Expr], None],
) -> None:
    """Launches persistent blocks, each of which runs compute(blocks, block, thread)."""
    across = -(-p.columns // shape.columns)
    # The maximum over all routings: every full tile, plus one partial tile per expert.
    tiles = ((p.rows + (shape.rows - 1)) // shape.rows + (p.spec.groups - 1)) * across
    count = T.min(T.max(tiles, 1), target.sms) if not blocks else blocks
    grid = T.launch_thread("blockIdx.x", count)
    with grid as block, T.launch_thread("threadIdx.x", shape.threads) as thread:
        compute(count, block, thread)


def _tiles(
    p: Product,
    target: CudaTarget,
    shape: TileShape,
    blocks: int | Expr,
    block: Expr,
    thread: Expr,
) -> None:
    tile = mma_tile(shape, p.spec.dtype, p.spec.k, thread)
    word = T.alloc_buffer((1,), "uint32", scope="local")
    rows = rows_of_copies(shape)

    def compute(owned: ExpertRows, column: Expr) -> None:
        _multiply(p, target, tile, owned, column, rows)
        store_tile(p, tile, owned, column, word)

    each_tile(p, shape, (blocks, block, thread), compute)


def _multiply(
    p: Product,
    target: CudaTarget,
    tile: MmaTile,
    owned: ExpertRows,
    column: Expr,
    rows: Buffer,
) -> None:
    """The sums of a tile. rows: scratch space."""
    (x,) = part_of_x(p, tile, owned, rows)
    w = part_of_w(p, tile, owned, column)
    if p.spec.dtype == "float32" and not target.tf32:
        multiply_floats(tile, x, w)
    else:
        tile.compute(x, w)


def each_tile(
    p: Product,
    shape: TileShape,
    launch: tuple[int | Expr, Expr, Expr],
    compute: Callable[[ExpertRows, Expr], None],
) -> None:
    """Runs compute(rows, first packed column) for each tile of this block. `launch` is the number
    of blocks, the index of this block, and the thread."""
    blocks, block, thread = launch
    tiles = tiles_of(p, shape.rows, shape.threads, thread)
    across = -(-p.columns // shape.columns)
    with T.serial(0, (tiles.total * across - block + (blocks - 1)) // blocks) as turn:
        index = T.bind(block + turn * blocks)
        if shape == LARGE:  # more registers than others have
            row, column = row_and_column(index, tiles.total, across)
        else:
            row, column = index // across, index % across
        compute(tiles.find(row), T.bind(column * shape.columns))


def store_tile(p: Product, tile: MmaTile, owned: ExpertRows, column: Expr, word: Buffer) -> None:
    """Stores the sums as rows of y."""
    lane = computed_here(tile.lane) if tile.shape in (LARGE, SMALL) else tile.lane
    first = T.bind(column + tile.first_column + lane % 4 * 2)
    for t in range(tile.row_fragments):
        for half in range(2):
            row = T.bind(owned.first + tile.first_row + t * 16 + half * 8 + lane // 4)
            at = [tile.sum_index(t, u, half) for u in range(tile.column_fragments)]
            fragments = [(tile.sums[i], tile.sums[i + 1]) for i in at]
            store_row(p, tile.shape.columns, owned, row, first, fragments, word)


# ---- float32 by fused multiply-adds: tensor cores do not keep all 24 bits ------------
# Stages, warps and the assignment of sums to threads are those of mma_tile.py: a thread has the
# rows lane / 4 + 8i of its warp, and pairs of columns. It loads 16 bytes of a row or a column at
# once; the eight rows and the four columns that a warp loads at once are in different banks.


_FLOATS = 4
"""Float32 elements in a piece of 16 bytes."""


def multiply_floats(tile: MmaTile, x: Part, w: Part) -> None:
    """Computes tile.sums = x @ w^T. No thread reads the stages after it returns."""
    rows = [(t, half) for t in range(tile.row_fragments) for half in range(2)]
    x_floats = T.alloc_buffer((len(rows) * _FLOATS,), "float32", scope="local")
    w_floats = T.alloc_buffer((_FLOATS,), "float32", scope="local")

    def read(target: Buffer, first: int, base: Expr, row: Expr, piece: int) -> None:
        at = base + tile.stages.offset(T.bind(row), T.int32(piece), tile.shape.depth)
        load_shared([target[first + i] for i in range(_FLOATS)], tile.stages.pointer(at))

    def multiply(base: Expr, step: Expr) -> None:
        columns = base + tile.shape.rows * tile.shape.depth
        for piece in range(tile.shape.depth // PIECE):
            for number, (t, half) in enumerate(rows):
                row = tile.first_row + t * 16 + half * 8 + tile.lane // 4
                read(x_floats, number * _FLOATS, base, row, piece)
            for u, i in itertools.product(range(tile.column_fragments), range(2)):
                read(w_floats, 0, columns, tile.first_column + u * 8 + tile.lane % 4 * 2 + i, piece)
                for (number, (t, half)), k in itertools.product(enumerate(rows), range(_FLOATS)):
                    at = tile.sum_index(t, u, half) + i
                    total = fma(x_floats[number * _FLOATS + k], w_floats[k], tile.sums[at])
                    T.buffer_store(tile.sums, total, [at])

    tile.clear(tile.sums)
    tile.stages.run([x, w], multiply)
