"""Products of each expert's rows with compressed weights, which a warp decodes.

    ternary   a codeword is up to 28 weights; its entry has the bits of those that are the row's
              least and of those that are its greatest (formats/ternary_code.py)
    2bit      a word is 32 codes: their low bits, then their high bits (formats/two_bit.py)

Each lane loads one codeword and its entry. Then the warp takes the 32 entries one after the other:
an entry is broadcast, and lane i multiplies weight i with elements of two rows of x. At the end the
sums of the lanes are added. Weights are decoded again for each two rows of an expert.

Source of the ternary form: QMoE, arXiv 2310.16795, section 4.3.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cuda.activation import Epilogue
from moec.codegen.cuda.gemm.gemv import column_of, launch_few_rows, parts_of, row_of_x
from moec.codegen.cuda.gemm.layout import GROUP
from moec.codegen.cuda.gemm.product import HALVES, Product, arguments
from moec.codegen.cuda.gemm.tiles import ExpertRows
from moec.codegen.cuda.instructions import WARP, fma, shuffle, shuffle_xor
from moec.codegen.cuda.quantised.round_rows import planes_of
from moec.codegen.specs.products import CompressedSpec
from moec.errors import NoMatch
from moec.formats.ternary import START, TOGETHER, starts_shape
from moec.formats.ternary_code import CODEWORDS
from moec.formats.two_bit import NEIGHBOURS, words
from moec.ops.experts.compressed import X_BITS
from moec.target.cuda import CudaTarget

ROWS = 2
"""Rows that a warp multiplies with each weight that it decodes."""


@dataclass(frozen=True)
class Compressed:
    """`table` int64[65536], then a stream and starts for each stack; or the planes of each stack.
    `row_scales` float32[R or T, 1]."""

    table: Buffer | None
    stacks: tuple[tuple[Buffer, ...], ...]
    row_scales: Buffer


def check_compressed(spec: CompressedSpec, epilogue: Epilogue | None) -> None:
    """Raises NoMatch for products that the kernel does not support."""
    if spec.y_dtype not in (*HALVES, "float32"):
        raise NoMatch(f"its result is {spec.y_dtype}")
    if spec.n % (GROUP if spec.gated else 2):
        raise NoMatch(f"its {spec.n} columns cannot be stored as pairs")
    if spec.gated and epilogue is None:
        raise NoMatch("gate and up need an epilogue that joins them")


def compressed_linear(
    spec: CompressedSpec,
    target: CudaTarget,
    *,
    epilogue: Epilogue | None = None,
    top_k: int = 0,
    blocks: int = 0,
    name: str = "compressed",
) -> PrimFunc:
    """A kernel ([table, ] stream and starts, or planes, of one stack or two, row scales
    f32[R or T, 1], x f16[R or T, 2 * k][, order], ends, grid[, bias], y[R, n]).

    `spec.dtype` is the dtype of bias and y; the grid bf16[E, columns, 2] and the bias of gate and
    up are interleaved. Raises NoMatch for products that the kernel does not support.
    """
    check_compressed(spec, epilogue)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tir.noalias": True})
            halves, table = range(1 + spec.gated), None
            if spec.kind == "ternary":
                table = _argument("table", (CODEWORDS,), "int64")
            stacks = tuple(_stack(spec, half) for half in halves)
            row_scales = _argument("row_scales", (T.int32(), 1), "float32")
            x = ("float16", planes_of(X_BITS) * spec.k)
            p = arguments(spec, epilogue, top_k, x=x, w=("bfloat16", 2))
            weights = Compressed(table, stacks, row_scales)
            launch_few_rows(p, target, blocks, ROWS, partial(_add, weights, spec))
    return builder.get()


def _argument(name: str, shape: tuple[Expr | int, ...], dtype: str) -> Buffer:
    return T.match_buffer(T.arg(name, T.handle()), shape, dtype)


def _stack(spec: CompressedSpec, half: int) -> tuple[Buffer, ...]:
    if spec.kind == "2bit":
        planes = (spec.groups, spec.n, words(spec.k))
        return (_argument(f"planes{half}", planes, "int64"),)
    shape = starts_shape(spec.groups * spec.n, spec.bytes_of_counts[half])
    stream = _argument(f"stream{half}", (T.int64(),), "int16")
    return stream, _argument(f"starts{half}", shape, "uint8")


def _add(
    weights: Compressed,
    spec: CompressedSpec,
    p: Product,
    owned: ExpertRows,
    column: Expr,
    lane: Expr,
    sums: Buffer,
) -> None:
    """Accumulates one lane's products; the `add` of `gemv.launch_few_rows`."""
    parts = parts_of(spec)
    expert = T.bind(T.cast(owned.expert, "int64"))
    rows = [T.bind(T.cast(row_of_x(p, owned, row), "int64")) for row in range(ROWS)]
    for part in range(parts):
        stored = T.bind(column_of(part, column))
        grid = [T.bind(T.cast(p.w[expert, stored, side], "float32")) for side in range(2)]
        # The column of the stack: gate and up are interleaved in the grid alone.
        at = column // (2 * GROUP) * GROUP + column % GROUP if spec.gated else column
        stack_column = T.bind(at + part % 2)
        targets = [row * parts + part for row in range(ROWS)]
        meet = partial(_meet, p, rows, sums, targets)
        stack = weights.stacks[part // 2]
        if spec.kind == "2bit":
            _planes(stack[0], spec.k, expert, stack_column, lane, grid, meet)
        else:
            assert weights.table is not None
            row = T.bind(expert * spec.n + stack_column)
            stream, starts = stack
            _codewords(weights.table, stream, starts, row, lane, grid, meet)
    scales = [T.bind(weights.row_scales[row, 0]) for row in rows]
    for row, part in itertools.product(range(ROWS), range(parts)):
        i = row * parts + part
        T.buffer_store(sums, sums[i] * scales[row], [i])


def _meet(
    p: Product, rows: list[Expr], sums: Buffer, targets: list[int], k: Expr, weight: Expr
) -> None:
    """sums += the weight times element k of each row, which is the sum of two planes."""
    for row, i in zip(rows, targets, strict=True):
        high, low = (T.cast(p.x[row, k + plane * p.spec.k], "float32") for plane in range(2))
        T.buffer_store(sums, fma(high + low, weight, sums[i]), [i])


def _planes(
    planes: Buffer,
    width: int,
    expert: Expr,
    column: Expr,
    lane: Expr,
    grid: list[Expr],
    meet: partial[None],
) -> None:
    step, zero = grid
    with T.serial(0, words(width)) as word:
        k = T.bind(word * NEIGHBOURS + lane)
        with T.If(k < width), T.Then():
            both = T.bind(planes[expert, column, word])
            low, high = (
                T.cast(T.bitwise_and(T.shift_right(both, T.cast(at, "int64")), 1), "float32")
                for at in (lane, lane + NEIGHBOURS)
            )
            meet(k, T.bind(step * (low + high + high - zero)))


def _codewords(
    table: Buffer,
    stream: Buffer,
    starts: Buffer,
    row: Expr,
    lane: Expr,
    grid: list[Expr],
    meet: partial[None],
) -> None:
    start, count = _row_of_stream(starts, row, lane)
    position = T.alloc_buffer((1,), "int32", scope="local")
    T.buffer_store(position, 0, [0])
    with T.serial(0, (count + (WARP - 1)) // WARP) as turn:
        left = T.bind(count - turn * WARP)
        word = T.bind(T.min(turn * WARP + lane, count - 1))
        code = T.bind(T.bitwise_and(T.cast(stream[start + word], "int64"), T.int64(0xFFFF)))
        entry = T.bind(table[code])
        lower = T.bind(T.cast(entry, "uint32"))
        upper = T.bind(T.cast(T.shift_right(entry, T.int64(32)), "uint32"))
        with T.serial(0, T.min(left, WARP)) as source:
            least = shuffle(lower, source, "uint32")
            rest = shuffle(upper, source, "uint32")
            bit = T.cast(lane, "uint32")
            is_least, is_greatest = (
                T.bind(T.bitwise_and(T.shift_right(mask, bit), T.uint32(1)))
                for mask in (least, T.bitwise_and(rest, T.uint32(0x0FFFFFFF)))
            )
            with T.If(T.bitwise_or(is_least, is_greatest) != T.uint32(0)), T.Then():
                meet(
                    T.bind(position[0] + lane),
                    T.bind(T.Select(is_least != T.uint32(0), grid[0], grid[1])),
                )
            pairs = T.cast(T.shift_right(rest, T.uint32(28)), "int32")
            T.buffer_store(position, position[0] + pairs * 2, [0])


def _row_of_stream(starts: Buffer, row: Expr, lane: Expr) -> tuple[Expr, Expr]:
    """The first codeword of a row of weights (int64), and their number (int32). Each lane reads
    the number of one row of the 32 that share a start."""
    size = (int(starts.shape[1]) - START) // TOGETHER
    inside, group = T.bind(T.cast(row % TOGETHER, "int32")), T.bind(row // TOGETHER)

    def byte(at: Expr | int, index: int, dtype: str) -> Expr:
        return T.shift_left(T.cast(starts[group, at], dtype), tirx.const(8 * index, dtype))

    count = byte(START + lane * size, 0, "int32")
    if size == 2:
        count = T.bitwise_or(count, byte(START + 1 + lane * size, 1, "int32"))
    count = T.bind(count)
    before = T.bind(T.Select(lane < inside, count, 0))
    for half in (16, 8, 4, 2, 1):
        before = T.bind(before + shuffle_xor(before, half, "int32"))
    start = byte(0, 0, "int64")
    for index in range(1, START):
        start = T.bitwise_or(start, byte(index, index, "int64"))
    return T.bind(start + T.cast(before, "int64")), shuffle(count, inside, "int32")
