"""Products with weights of few bits for few rows: codes are widened in registers; no tensor cores.

A lane loads 16 bytes of codes, which share one scale, and the codes of two rows at the same
positions. The products are summed, and the sum is multiplied by both scales. Everything else is as
in gemv.py.
"""

from __future__ import annotations

import itertools

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.gemm.gemv import column_of, floats, floats_of, parts_of, row_of_x
from moec.codegen.cuda.gemm.product import Product
from moec.codegen.cuda.gemm.tiles import ExpertRows
from moec.codegen.cuda.instructions import WARP, fma, load_past_cache
from moec.codegen.cuda.quantised.codes import WORDS, Codes, piece_of, weight_pair, zero_pair
from moec.codegen.cuda.quantised.round_rows import planes_of
from moec.codegen.specs.products import QuantisedSpec

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
