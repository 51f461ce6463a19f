"""Products of each expert's rows with that expert's weights; rows lie sorted by expert.

    y[r] = f(x[row of r] @ w[e]^T + bias[e])        for ends[e-1] <= r < ends[e]

"row of r" is r itself, or, where the dispatch is folded in (`top_k`), the token order[r] // top_k:
then the rows of x are read where they are and never copied. Rows of y that no expert owns are left
as they are. Gated weights lie interleaved: see layout.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cuda.activation import Epilogue
from moec.codegen.cuda.instructions import round_pair
from moec.codegen.cuda.layout import GROUP
from moec.codegen.cuda.mma_tile import MmaTile, Source, mma_tile
from moec.codegen.cuda.tiles import LARGE, ExpertRows, TileShape, row_tiles
from moec.codegen.specs.products import LinearSpec
from moec.errors import NoMatch
from moec.target.cuda import CudaTarget

HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class _Product:
    spec: LinearSpec
    epilogue: Epilogue | None
    ends: Buffer
    x: Buffer
    order: Buffer | None
    top_k: int
    w: Buffer
    bias: Buffer | None
    y: Buffer
    rows: Expr

    @property
    def columns(self) -> int:
        """Of the packed weights."""
        return self.spec.n * (2 if self.spec.gated else 1)


def grouped_linear(
    spec: LinearSpec,
    target: CudaTarget,
    *,
    epilogue: Epilogue | None = None,
    top_k: int = 0,
    shape: TileShape = LARGE,
    blocks: int = 0,
    name: str = "grouped",
) -> PrimFunc:
    """A kernel (x[R or T, k][, order i32[R]], ends i32[E], w packed[, bias packed], y[R, n]).

    With `top_k` it takes `order`. `blocks` is the grid: 0 for one block on each SM.
    Raises NoMatch for what the tile cannot do.
    """
    check(spec, target, epilogue, shape)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tir.noalias": True})
            product = _arguments(spec, epilogue, top_k)
            grid = T.launch_thread("blockIdx.x", blocks or target.sms)
            with grid as block, T.launch_thread("threadIdx.x", shape.threads) as thread:
                _tiles(product, shape, blocks or target.sms, block, thread)
    return builder.get()


def check(
    spec: LinearSpec, target: CudaTarget, epilogue: Epilogue | None, shape: TileShape
) -> None:
    """Raises NoMatch where mma.sync tiles of 16 bits cannot compute the product."""
    if spec.dtype not in HALVES:
        raise NoMatch(f"products of {spec.dtype} have no CUDA kernel, those of 16 bits have")
    if spec.y_dtype not in (spec.dtype, "float32"):
        raise NoMatch(f"its result is {spec.y_dtype}, not {spec.dtype} or float32")
    if spec.k % 8:
        raise NoMatch(f"its rows of {spec.k} elements are no multiple of 16 bytes")
    if spec.n % (GROUP if spec.gated else 2):
        raise NoMatch(f"its {spec.n} columns cannot be stored as pairs of 16-bit fragments")
    if spec.gated and epilogue is None:
        raise NoMatch("gate and up need an epilogue that joins them")
    if shape.shared_memory + 8 * (spec.groups + 1) > target.shared_memory:
        raise NoMatch(
            f"its tile needs {shape.shared_memory} bytes of shared memory, and a block of "
            f"{target.name} has {target.shared_memory}"
        )


def _arguments(spec: LinearSpec, epilogue: Epilogue | None, top_k: int) -> _Product:
    many, tokens = T.int32(), T.int32()
    columns = spec.n * (2 if spec.gated else 1)
    x_rows = tokens if top_k else many

    def argument(name: str, shape: tuple[Expr | int, ...], dtype: str) -> Buffer:
        return T.match_buffer(T.arg(name, T.handle()), shape, dtype)

    x = argument("x", (x_rows, spec.k), spec.dtype)
    order = argument("order", (many,), "int32") if top_k else None
    ends = argument("ends", (spec.groups,), "int32")
    w = argument("w", (spec.groups, columns, spec.k), spec.dtype)
    bias = argument("bias", (spec.groups, columns), spec.dtype) if spec.bias else None
    y = argument("y", (many, spec.n), spec.y_dtype)
    return _Product(spec, epilogue, ends, x, order, top_k, w, bias, y, many)


def _tiles(p: _Product, shape: TileShape, blocks: int, block: Expr, thread: Expr) -> None:
    tile = mma_tile(shape, p.spec.dtype, p.spec.k, thread)
    word = T.alloc_buffer((1,), "uint32", scope="local")
    rows = T.alloc_buffer(
        (len(range(0, shape.rows * shape.depth // 8, shape.threads)),), "int32", scope="local"
    )
    tiles = row_tiles(p.ends, p.spec.groups, shape.rows, shape.threads, thread)
    across = -(-p.columns // shape.columns)
    with T.serial(0, (tiles.total * across - block + (blocks - 1)) // blocks) as turn:
        index = T.bind(block + turn * blocks)
        owned = tiles.find(index // across)
        column = T.bind(index % across * shape.columns)
        tile.compute(_rows_of_x(p, tile, owned, rows), _rows_of_w(p, tile, owned, column))
        _store(p, tile, owned, column, word)


def _rows_of_x(p: _Product, tile: MmaTile, owned: ExpertRows, rows: Buffer) -> Source:
    """Those behind the end are the last one again: read, and not stored."""
    for turn, (row, _) in enumerate(tile.pieces(tile.shape.rows)):
        r = T.bind(T.min(owned.first + row, owned.end - 1))
        T.buffer_store(rows, r if p.order is None else p.order[r] // p.top_k, [turn])
    # 32 bits do not hold rows * k.
    return Source(
        tile.shape.rows,
        lambda turn, column: p.x.ptr_to([T.cast(rows[turn], "int64"), column]),
    )


def _rows_of_w(p: _Product, tile: MmaTile, owned: ExpertRows, column: Expr) -> Source:
    expert = T.bind(T.cast(owned.expert, "int64"))  # 32 bits do not hold E * n * k
    pieces = tile.pieces(tile.shape.columns)

    def pointer(turn: int, k: Expr) -> Expr:
        row = column + pieces[turn][0]
        if p.columns % tile.shape.columns:
            row = T.min(row, p.columns - 1)
        return p.w.ptr_to([expert, row, k])

    return Source(tile.shape.columns, pointer)


def _store(p: _Product, tile: MmaTile, owned: ExpertRows, column: Expr, word: Buffer) -> None:
    step = 2 if p.spec.gated else 1  # fragments that one result is made of
    for t in range(tile.row_fragments):
        for half in range(2):
            row = T.bind(owned.first + tile.first_row + t * 16 + half * 8 + tile.lane // 4)
            with T.If(row < owned.end), T.Then():
                for u in range(0, tile.column_fragments, step):
                    at = T.bind(column + tile.first_column + u * 8 + tile.lane % 4 * 2)
                    if p.columns % tile.shape.columns:
                        with T.If(at < p.columns), T.Then():
                            _store_pair(p, tile, owned, row, at, (t, u, half), word)
                    else:
                        _store_pair(p, tile, owned, row, at, (t, u, half), word)


def _store_pair(
    p: _Product,
    tile: MmaTile,
    owned: ExpertRows,
    row: Expr,
    column: Expr,
    fragment: tuple[int, int, int],
    word: Buffer,
) -> None:
    """Two neighbours of y, from packed `column` on."""
    t, u, half = fragment
    results = []
    for i in range(2):
        parts = []
        for part in range(2 if p.spec.gated else 1):
            value = tile.sums[tile.sum_index(t, u + part, half) + i]
            if p.bias is not None:
                at = column + part * GROUP + i
                value = value + T.cast(p.bias[owned.expert, at], "float32")
            parts.append(T.bind(value))
        results.append(T.bind(p.epilogue(*parts)) if p.epilogue else parts[0])
    to = T.bind(column // 16 * 8 + column % 8 if p.spec.gated else column)
    wide = T.cast(row, "int64")
    if p.spec.y_dtype == "float32":
        for i, result in enumerate(results):
            T.buffer_store(p.y, result, [wide, to + i])
        return
    round_pair(p.spec.dtype, word[0], *results)
    words = T.decl_buffer((p.rows, p.spec.n // 2), "uint32", data=p.y.data)
    T.buffer_store(words, word[0], [wide, to // 2])
