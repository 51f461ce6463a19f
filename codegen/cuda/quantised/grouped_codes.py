"""Products of each expert's rows with weights of few bits; codes.py describes the formats.

With at most one row per expert on average, codes are widened for a few rows.
With more, tensor cores are used, in tiles of 16 rows if experts have few rows, else of 64. The host
decides at launch. Both take rows from `round_rows`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cuda.activation import Epilogue
from moec.codegen.cuda.gemm.gemv import (
    column_of,
    floats,
    floats_of,
    launch_few_rows,
    parts_of,
    row_of_x,
)
from moec.codegen.cuda.gemm.grouped import (
    by_rows,
    each_tile,
    launch_tiles,
    store_tile,
)
from moec.codegen.cuda.gemm.mma_tile import rows_of_copies
from moec.codegen.cuda.gemm.product import Product, arguments, check_shared_memory
from moec.codegen.cuda.gemm.tiles import CODES, SMALL, ExpertRows, TileShape
from moec.codegen.cuda.instructions import WARP, argument, fma, kernel, load_past_cache
from moec.codegen.cuda.quantised.code_tile import code_tile, stage_of
from moec.codegen.cuda.quantised.codes import (
    WORDS,
    Codes,
    check_codes,
    piece_of,
    weight_pair,
    zero_pair,
)
from moec.codegen.cuda.quantised.round_rows import planes_of
from moec.codegen.specs.products import QuantisedSpec
from moec.target.cuda import CudaTarget

# Products with weights of few bits for few rows: codes are widened in registers; no tensor cores.
#
# A lane loads 16 bytes of codes, which share one scale, and the codes of two rows at the same
# positions. The products are summed, and the sum is multiplied by both scales. Everything else is
# as in gemv.py.

ROWS = 2
"""Rows that a warp multiplies with the codes that it loads."""
_ELEMENTS = 8  # float16 elements that a lane loads at once


def add_codes(
    codes: Codes, p: Product, owned: ExpertRows, column: Expr, lane: Expr, sums: Buffer
) -> None:
    """Accumulates one lane's products; the `add` of `gemv.launch_few_rows`."""
    spec = p.spec
    assert isinstance(spec, QuantisedSpec)
    parts, format = parts_of(spec), spec.format
    expert = T.bind(T.cast(owned.expert, "int64"))  # E * n * k may exceed 32 bits
    rows = [row_of_x(p, owned, row) for row in range(ROWS)]
    words = T.alloc_buffer((parts * WORDS,), "uint32", scope="local")
    zeros = T.alloc_buffer((parts,), "uint32", scope="local")
    products = T.alloc_buffer((ROWS * parts,), "float32", scope="local")
    piece = piece_of(format.bits)
    with T.serial(0, -(-spec.k // (WARP * piece))) as turn:
        k = T.bind((turn * WARP + lane) * piece)
        with T.If(k < spec.k), T.Then():
            block = T.bind(k // (spec.k // format.blocks(spec.k)))
            columns = [T.bind(column_of(part, column)) for part in range(parts)]
            for part, at in enumerate(columns):
                targets = [words[part * WORDS + i] for i in range(WORDS)]
                load_past_cache(targets, p.w.ptr_to([expert, at, k * format.bits // 8]))
                zero = None
                if codes.zeros is not None:
                    zero = T.bind(T.cast(codes.zeros[expert, at, block], "uint32"))
                T.buffer_store(zeros, zero_pair(format.bits, zero), [part])
            scales = [T.bind(codes.scale(format.kind, expert, at, block)) for at in columns]
            row_scales = [T.bind(codes.row_scales[T.cast(row, "int64"), block]) for row in rows]
            for i in range(ROWS * parts):
                T.buffer_store(products, T.float32(0), [i])
            buffers = (words, zeros, products)
            if format.bits == 8:  # as a loop, fp8 spills on sm_89
                for eighth in range(piece // _ELEMENTS):
                    _add_eight(p, spec, rows, k, buffers, eighth)
            else:  # written out, mxfp4 spills on sm_100a and sm_120
                with T.serial(0, piece // _ELEMENTS) as eighth:
                    _add_eight(p, spec, rows, k, buffers, eighth)
            for row, row_scale in enumerate(row_scales):
                for part, scale in enumerate(scales):
                    i = row * parts + part
                    T.buffer_store(sums, fma(products[i], scale * row_scale, sums[i]), [i])


def _add_eight(
    p: Product,
    spec: QuantisedSpec,
    rows: list[Expr],
    k: Expr,
    buffers: tuple[Buffer, Buffer, Buffer],
    eighth: Expr | int,
) -> None:
    """products += eight codes of the rows, from k on, times eight codes of the weights. The pairs
    of an eighth are `eighth` codes from the start of each word (`codes.place`)."""
    words, zeros, products = buffers
    parts, format = parts_of(spec), spec.format
    x = [_codes_of_row(p, spec, row, k + eighth * _ELEMENTS) for row in rows]
    pair = T.alloc_buffer((1,), "uint32", scope="local")
    for part, q in itertools.product(range(parts), range(WORDS)):
        word, zero = words[part * WORDS + q], zeros[part]
        weight_pair(format.kind, format.bits, word, eighth, zero, pair[0])
        for second, w in enumerate(map(T.bind, floats_of(pair[0], "float16"))):
            for row in range(ROWS):
                at = row * parts + part
                T.buffer_store(products, fma(x[row][q * 2 + second], w, products[at]), [at])


def _codes_of_row(p: Product, spec: QuantisedSpec, row: Expr, k: Expr) -> list[Expr]:
    """Eight codes of a row in float32, each the sum of its planes."""
    words = T.alloc_buffer((WORDS,), "uint32", scope="local")
    total: list[Expr] = []
    for plane in range(planes_of(spec.format.row_bits)):
        targets = [words[i] for i in range(WORDS)]
        load_past_cache(targets, p.x.ptr_to([T.cast(row, "int64"), k + plane * spec.k]))
        values = floats(words, 0, "float16")
        if plane:
            values = [a + b for a, b in zip(total, values, strict=True)]
        total = [T.bind(value) for value in values]
    return total


SHAPES = (SMALL, CODES)


def check_grouped_codes(spec: QuantisedSpec, target: CudaTarget, epilogue: Epilogue | None) -> None:
    """Raises NoMatch for products that the kernels do not support."""
    check_codes(spec, epilogue)
    for shape in SHAPES:
        check_shared_memory(spec, target, _shared_memory(shape, spec))


def _shared_memory(shape: TileShape, spec: QuantisedSpec) -> int:
    return shape.stages * stage_of(shape, spec) * 2


def grouped_codes(
    spec: QuantisedSpec,
    target: CudaTarget,
    *,
    epilogue: Epilogue | None = None,
    top_k: int = 0,
    shape: TileShape | None = None,
    blocks: int = 0,
    name: str = "codes",
) -> PrimFunc:
    """A kernel (scales[, zeros], row scales f32[R or T, blocks], x f16[R or T, planes * k] [,
    order], ends, codes[, bias], y[R, n]).

    `spec.dtype` is the dtype of bias and y. `shape` is the tile; None selects one at launch, by the
    number of rows. Raises NoMatch for products that the tile does not support.
    """
    check_codes(spec, epilogue)
    for one in SHAPES if shape is None else (shape,):
        check_shared_memory(spec, target, _shared_memory(one, spec))

    def tiles(codes: Codes, p: Product, shape: TileShape) -> None:
        launch_tiles(p, target, shape, blocks, partial(_tiles, p, codes, shape))

    def launch(codes: Codes, p: Product) -> None:
        if shape is not None:
            tiles(codes, p, shape)
            return
        few = partial(launch_few_rows, p, target, blocks, ROWS, partial(add_codes, codes))
        by_rows(p, few, *(partial(tiles, codes, p, one) for one in SHAPES))

    return _kernel(spec, epilogue, top_k, name, launch)


def gemv_codes(
    spec: QuantisedSpec,
    target: CudaTarget,
    *,
    epilogue: Epilogue | None = None,
    top_k: int = 0,
    blocks: int = 0,
    name: str = "gemv_codes",
) -> PrimFunc:
    """A kernel with the same arguments as `grouped_codes`, for few rows only."""
    check_codes(spec, epilogue)

    def launch(codes: Codes, p: Product) -> None:
        launch_few_rows(p, target, blocks, ROWS, partial(add_codes, codes))

    return _kernel(spec, epilogue, top_k, name, launch)


def _kernel(
    spec: QuantisedSpec,
    epilogue: Epilogue | None,
    top_k: int,
    name: str,
    launch: Callable[[Codes, Product], None],
) -> PrimFunc:
    with kernel(name) as builder:
        format, columns = spec.format, spec.n * (2 if spec.gated else 1)
        blocks = format.blocks(spec.k)
        shape = (spec.groups, columns, blocks)
        scale_type = "uint8" if format.kind == "mxfp4" else "bfloat16"
        scales = argument("scales", shape, scale_type)
        zeros = None
        if format.asymmetric:
            zeros = argument("zeros", shape, "uint8")
        row_scales = argument("row_scales", (T.int32(), blocks), "float32")
        x = ("float16", planes_of(format.row_bits) * spec.k)
        stored = ("uint8", spec.k * format.bits // 8)
        p = arguments(spec, epilogue, top_k, x=x, w=stored)
        launch(Codes(scales, zeros, row_scales), p)
    return builder.get()


def _tiles(
    p: Product, codes: Codes, shape: TileShape, blocks: int | Expr, block: Expr, thread: Expr
) -> None:
    tile = code_tile(shape, p, codes, thread)
    word = T.alloc_buffer((1,), "uint32", scope="local")
    copies = rows_of_copies(shape)

    def compute(owned: ExpertRows, column: Expr) -> None:
        tile.compute(owned, column, copies)
        store_tile(p, tile.result, owned, column, word)

    each_tile(p, shape, (blocks, block, thread), compute)
