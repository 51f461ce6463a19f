"""Products of each expert's rows with weights of few bits; codes.py describes the formats.

With at most one row per expert on average, codes are widened for a few rows, as in gemv_codes.py.
With more, tensor cores are used, in tiles of 16 rows if experts have few rows, else of 64. The host
decides at launch. Both take rows from `round_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from moec.codegen.cuda.activation import Epilogue
from moec.codegen.cuda.gemm.gemv import launch_few_rows
from moec.codegen.cuda.gemm.grouped import (
    by_rows,
    each_tile,
    launch_tiles,
    store_tile,
)
from moec.codegen.cuda.gemm.parts import rows_of_copies
from moec.codegen.cuda.gemm.product import Product, arguments, check_shared_memory
from moec.codegen.cuda.gemm.tiles import CODES, SMALL, ExpertRows, TileShape
from moec.codegen.cuda.quantised.code_tile import code_tile, stage_of
from moec.codegen.cuda.quantised.codes import Codes, check_codes
from moec.codegen.cuda.quantised.gemv_codes import ROWS, add_codes
from moec.codegen.cuda.quantised.round_rows import planes_of
from moec.codegen.specs.products import QuantisedSpec
from moec.target.cuda import CudaTarget

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
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tir.noalias": True})
            format, columns = spec.format, spec.n * (2 if spec.gated else 1)
            blocks = format.blocks(spec.k)
            shape = (spec.groups, columns, blocks)
            scale_type = "uint8" if format.kind == "mxfp4" else "bfloat16"
            scales = T.match_buffer(T.arg("scales", T.handle()), shape, scale_type)
            zeros = None
            if format.asymmetric:
                zeros = T.match_buffer(T.arg("zeros", T.handle()), shape, "uint8")
            handle = T.arg("row_scales", T.handle())
            row_scales = T.match_buffer(handle, (T.int32(), blocks), "float32")
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
