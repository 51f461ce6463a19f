"""Products of experts on sm_90a: like grouped.py, by TMA and wgmma.

    y[r] = f(x[row of r] @ w[e]^T + bias[e])        for ends[e-1] <= r < ends[e]

Boxes may extend beyond an expert's rows or weights: results there are not stored. TMA fills
elements outside the tensors with zeros. TMA copies neighbours: rows that are gathered are copied by
cp.async.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from moec.codegen.cuda.activation import Epilogue
from moec.codegen.cuda.gemm.gemv import row_of_x
from moec.codegen.cuda.gemm.product import (
    HALVES,
    Product,
    arguments,
    check_product,
    store_row,
    tiles_of,
)
from moec.codegen.cuda.gemm.tiles import ExpertRows, OneExpert, RowTiles, row_and_column
from moec.codegen.cuda.gemm.wgmma_tile import (
    COLUMNS,
    COPIES,
    ROWS,
    THREADS,
    WgmmaTile,
    columns_of,
    shared_memory,
    tensor_map,
    wgmma_tile,
)
from moec.codegen.cuda.instructions import give_registers, take_registers
from moec.codegen.specs.products import LinearSpec
from moec.errors import NoMatch
from moec.target.cuda import CudaTarget

_LOADING, _MULTIPLYING = 56, 224  # registers per thread; the launch allots 168 to all


def grouped_linear_wgmma(
    spec: LinearSpec,
    target: CudaTarget,
    *,
    epilogue: Epilogue | None = None,
    top_k: int = 0,
    blocks: int = 0,
    name: str = "grouped",
) -> PrimFunc:
    """A kernel (x[R or T, k][, order i32[R]], ends i32[E], w packed[, bias packed], y[R, n]).

    With `top_k` it has the argument `order`. `blocks` is the grid size; 0 means one block per SM.
    Raises NoMatch for products that the tile does not support.
    """
    check_wgmma(spec, target, epilogue)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tir.noalias": True})
            launch_wgmma(arguments(spec, epilogue, top_k), target, blocks)
    return builder.get()


def check_wgmma(spec: LinearSpec, target: CudaTarget, epilogue: Epilogue | None) -> None:
    """Raises NoMatch for products that the tile does not support."""
    if "wgmma" not in target.tensor_cores:
        raise NoMatch(f"{target.name} has no wgmma: only sm_90a has it")
    check_product(spec, target, epilogue, shared_memory(COLUMNS[-1]))
    if spec.dtype not in HALVES:
        raise NoMatch(f"wgmma would round {spec.dtype}")


def launch_wgmma(p: Product, target: CudaTarget, blocks: int = 0) -> None:
    """Launches a product by persistent blocks, one per SM unless `blocks` says how many."""
    spec, count, gathers = p.spec, blocks or target.sms, p.order is not None
    columns = columns_of(p.columns)
    x = None if gathers else tensor_map(p.x, T.cast(p.rows, "int64"), spec, ROWS)
    w = tensor_map(p.w, T.int64(spec.groups * p.columns), spec, columns)
    grid = T.launch_thread("blockIdx.x", count)
    with grid as block, T.launch_thread("threadIdx.x", THREADS) as thread:
        tile = wgmma_tile(spec, columns, thread, gathers=gathers)
        tile.start()
        tiles = tiles_of(p, ROWS, THREADS, thread)
        with T.If(tile.group == 0):
            with T.Then():
                give_registers(_LOADING)
                if x is None:
                    done = _each_tile(p, tile, tiles, count, block, _gatherer(p, tile, w))
                    tile.finish(done)
                else:
                    with T.If(thread == 0), T.Then():
                        _each_tile(p, tile, tiles, count, block, _loader(p, tile, x, w))
            with T.Else():
                take_registers(_MULTIPLYING)
                _each_tile(p, tile, tiles, count, block, _multiplier(p, tile))


def _each_tile(
    p: Product,
    tile: WgmmaTile,
    tiles: RowTiles | OneExpert,
    blocks: int,
    block: Expr,
    body: Callable[[ExpertRows, Expr, Expr], None],
) -> Expr:
    """Runs body(rows, first column, stages before it) for each tile of this block, in order.
    Returns the stages of all tiles."""
    across = -(-p.columns // tile.columns)
    turns = T.bind((tiles.total * across - block + (blocks - 1)) // blocks)
    with T.serial(0, turns) as turn:
        row, column = row_and_column(T.bind(block + turn * blocks), tiles.total, across)
        body(tiles.find(row), T.bind(column * tile.columns), T.bind(turn * tile.steps))
    return T.bind(turns * tile.steps)


def _loader(
    p: Product, tile: WgmmaTile, x: Expr, w: Expr
) -> Callable[[ExpertRows, Expr, Expr], None]:
    def load(owned: ExpertRows, column: Expr, done: Expr) -> None:
        tile.load(x, w, owned.first, owned.expert * p.columns + column, done)

    return load


def _gatherer(p: Product, tile: WgmmaTile, w: Expr) -> Callable[[ExpertRows, Expr, Expr], None]:
    rows = T.alloc_buffer((COPIES,), "int32", scope="local")

    def load(owned: ExpertRows, column: Expr, done: Expr) -> None:
        for copy in range(COPIES):
            T.buffer_store(rows, row_of_x(p, owned, tile.row(copy)), [copy])

        def address(copy: int, k: Expr) -> Expr:
            return p.x.ptr_to([T.cast(rows[copy], "int64"), k])  # rows * k may exceed 32 bits

        tile.gather(address, w, owned.expert * p.columns + column, done)

    return load


def _multiplier(p: Product, tile: WgmmaTile) -> Callable[[ExpertRows, Expr, Expr], None]:
    word = T.alloc_buffer((1,), "uint32", scope="local")
    lane, warp = tile.thread % 32, tile.thread % 128 // 32

    def compute(owned: ExpertRows, column: Expr, done: Expr) -> None:
        tile.compute(done)
        first = T.bind(column + lane % 4 * 2)
        for half in range(2):
            above = owned.first + (tile.group - 1) * 64
            row = T.bind(above + warp * 16 + half * 8 + lane // 4)
            at = [u * 4 + half * 2 for u in range(tile.columns // 8)]
            fragments = [(tile.sums[i], tile.sums[i + 1]) for i in at]
            store_row(p, tile.columns, owned, row, first, fragments, word)

    return compute
