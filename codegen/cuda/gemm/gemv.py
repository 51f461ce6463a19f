"""Products for few rows: a warp computes two columns of a few rows of one expert.

    y[r, c] = sum over k of x[row of r, k] * w[e, c, k]      for c, c + 1 of the rows of a tile

Lane l loads the pieces l, l + 32, ... of 16 bytes of a row of weights, multiplies them with the
same pieces of each row of x, and accumulates in float32. At the end, the sums of the lanes are
added in a butterfly reduction. An expert with at most four rows (two for float32) reads its weights
once, in order, bypassing the L1 cache, so the product takes about as long as reading the weights.
Consecutive warps have consecutive columns, so they read consecutive weights. 16-bit weights are
widened in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.activation import Epilogue
from moec.codegen.cuda.gemm.product import (
    GROUP,
    HALVES,
    Product,
    store_row,
    tiles_of,
)
from moec.codegen.cuda.gemm.tiles import ExpertRows
from moec.codegen.cuda.instructions import (
    WARP,
    computed_here,
    fma,
    load_past_cache,
    shuffle_xor,
)
from moec.codegen.specs.products import LinearSpec
from moec.errors import NoMatch
from moec.target.cuda import CudaTarget

ROWS = 4
"""Rows of one expert that a warp multiplies with the 16-bit weights that it loads."""
_ROWS_OF_FLOATS = 2  # more rows need over 64 registers, and spill
_WARPS = 4
_BLOCKS = 8  # per SM: enough to hide the latency of memory
_WORDS = 4  # of 32 bits in a piece of 16 bytes

Accumulate: TypeAlias = Callable[[Product, ExpertRows, Expr, Expr, Buffer], None]
"""(product, rows of the tile, first packed column, lane, sums float32[rows * parts])"""


def check_few_rows(spec: LinearSpec, epilogue: Epilogue | None) -> None:
    """Raises NoMatch for products that these kernels do not support."""
    if spec.dtype not in (*HALVES, "float32"):
        raise NoMatch(f"products of {spec.dtype} have no CUDA kernel")
    if spec.y_dtype not in (spec.dtype, "float32"):
        raise NoMatch(f"its result is {spec.y_dtype}, not {spec.dtype} or float32")
    if spec.k % _elements(spec.dtype):
        raise NoMatch(f"its rows of {spec.k} elements are not a multiple of 16 bytes")
    if spec.gated and spec.n % GROUP:
        raise NoMatch(f"its {spec.n} columns of gate and up cannot be interleaved")
    if spec.gated and epilogue is None:
        raise NoMatch("gate and up need an epilogue that joins them")


def launch_few_rows(
    p: Product,
    target: CudaTarget,
    blocks: int = 0,
    rows: int = 0,
    add: Accumulate | None = None,
) -> None:
    """Launches the product for any number of rows. `blocks` is the grid size; 0 means as many as
    the GPU holds.

    `add` accumulates the products of one lane for `rows` rows; the default is that of 16-bit and
    float32 weights.
    """
    is_plain = add is None
    pairs, rows, add = -(-p.spec.n // 2), rows or _rows(p.spec), add or _accumulate
    tiles = (p.rows + (rows - 1)) // rows + (p.spec.groups - 1)
    most = T.max((tiles * pairs + (_WARPS - 1)) // _WARPS, 1)
    count = blocks or T.min(most, target.sms * _BLOCKS)
    grid = T.launch_thread("blockIdx.x", count)
    with grid as block, T.launch_thread("threadIdx.x", _WARPS * WARP) as thread:
        lane = T.bind(thread % WARP)
        first = T.bind(block * _WARPS + thread // WARP)
        owners = tiles_of(p, rows, _WARPS * WARP, thread)
        step = count * _WARPS
        with T.serial(0, T.max(owners.total * pairs - first + (step - 1), 0) // step) as turn:
            index = T.bind(first + turn * step)
            owned = owners.find(index // pairs)
            column = T.bind(_column(p.spec, index % pairs))
            parts = parts_of(p.spec)
            sums = T.alloc_buffer((rows * parts,), "float32", scope="local")
            for i in range(rows * parts):
                T.buffer_store(sums, T.float32(0), [i])
            add(p, owned, column, lane, sums)
            for i in range(rows * parts):
                for half in (16, 8, 4, 2, 1):
                    T.buffer_store(sums, sums[i] + shuffle_xor(sums[i], half), [i])
            word = T.alloc_buffer((1,), "uint32", scope="local")
            if not is_plain:  # decoding leaves few registers
                with T.If(lane == 0), T.Then():
                    for row in range(rows):
                        at = range(row * parts, (row + 1) * parts, 2)
                        fragments = [(sums[i], sums[i + 1]) for i in at]
                        store_row(p, 2, owned, owned.first + row, column, fragments, word)
                return
            row = computed_here(lane)
            with T.If(row < rows), T.Then():  # all lanes have all sums; each stores one row
                values = [T.bind(_of_row(sums, row, rows, parts, part)) for part in range(parts)]
                fragments = list(zip(values[::2], values[1::2], strict=True))
                store_row(p, 2, owned, T.bind(owned.first + row), column, fragments, word)


def _of_row(sums: Buffer, row: Expr, rows: int, parts: int, part: int) -> Expr:
    """The sum of a part of the row, by comparisons: an array that is indexed by a variable would be
    in memory."""
    value = sums[part]
    for other in range(1, rows):
        value = T.Select(row == other, sums[other * parts + part], value)
    return value


def _accumulate(p: Product, owned: ExpertRows, column: Expr, lane: Expr, sums: Buffer) -> None:
    parts, count = parts_of(p.spec), _rows(p.spec)
    expert = T.bind(T.cast(owned.expert, "int64"))  # E * n * k may exceed 32 bits
    rows = [row_of_x(p, owned, row) for row in range(count)]
    weights = T.alloc_buffer((parts * _WORDS,), "uint32", scope="local")
    words = T.alloc_buffer((_WORDS,), "uint32", scope="local")
    piece = _elements(p.spec.dtype)
    with T.serial(0, -(-p.spec.k // (WARP * piece))) as turn:
        k = T.bind((turn * WARP + lane) * piece)
        with T.If(k < p.spec.k), T.Then():
            for part in range(parts):
                targets = [weights[part * _WORDS + i] for i in range(_WORDS)]
                at = column_of(part, column)
                at = T.min(at, p.columns - 1) if p.spec.n % 2 else at
                load_past_cache(targets, p.w.ptr_to([expert, at, k]))
            for row in range(count):
                load_past_cache(
                    [words[i] for i in range(_WORDS)], p.x.ptr_to([T.cast(rows[row], "int64"), k])
                )
                x = [T.bind(value) for value in floats(words, 0, p.spec.dtype)]
                for part in range(parts):
                    w = floats(weights, part * _WORDS, p.spec.dtype)
                    _add_products(sums, row * parts + part, x, w)


def _add_products(sums: Buffer, index: int, x: Sequence[Expr], w: Sequence[Expr]) -> None:
    for left, right in zip(x, w, strict=True):
        T.buffer_store(sums, fma(left, right, sums[index]), [index])


def column_of(part: int, column: Expr) -> Expr:
    """The packed column of a part, given the first column of gate: parts 0 and 1 are columns of
    gate, parts 2 and 3 the same columns of up."""
    return column + part // 2 * GROUP + part % 2


def row_of_x(p: Product, owned: ExpertRows, row: Expr | int) -> Expr:
    """The row of x, clamped to the expert's last row: rows beyond the end are computed but not
    stored."""
    r = T.bind(T.min(owned.first + row, owned.end - 1))
    return T.bind(r if p.order is None else p.order[r] // p.top_k)


def _column(spec: LinearSpec, pair: Expr) -> Expr:
    """The packed column of the first of a pair; layout.py describes how gate and up are
    interleaved."""
    if not spec.gated:
        return pair * 2
    return pair * 2 // GROUP * (2 * GROUP) + pair * 2 % GROUP


def parts_of(spec: LinearSpec) -> int:
    """The number of rows of weights that a pair of columns needs."""
    return 4 if spec.gated else 2


def _rows(spec: LinearSpec) -> int:
    return ROWS if spec.dtype in HALVES else _ROWS_OF_FLOATS


def _elements(dtype: str) -> int:
    """The number of elements in 16 bytes."""
    return 8 if dtype in HALVES else 4


def floats(words: Buffer, first: int, dtype: str) -> list[Expr]:
    """The elements of four words from `first` on, as float32."""
    return [value for i in range(_WORDS) for value in floats_of(words[first + i], dtype)]


def floats_of(word: Expr, dtype: str) -> list[Expr]:
    """The elements in one word of 32 bits, as float32."""
    if dtype == "float32":
        return [T.reinterpret("float32", word)]
    if dtype == "bfloat16":
        high = T.bitwise_and(word, T.uint32(0xFFFF0000))
        return [T.reinterpret("float32", bits) for bits in (T.shift_left(word, T.uint32(16)), high)]
    parts = [
        T.bitwise_and(half, T.uint32(0xFFFF)) for half in (word, T.shift_right(word, T.uint32(16)))
    ]
    return [T.cast(T.reinterpret("float16", T.cast(part, "uint16")), "float32") for part in parts]
