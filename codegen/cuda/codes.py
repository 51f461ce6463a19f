"""Products with weights of few bits, dequantised in registers; rows are rounded before.

    int8, int4   w = (code - zero) * scale          zero 2^(bits-1), or one a block
    mxfp4        w = e2m1(code) * 2^(scale - 127)   OCP Microscaling Formats 1.0

    codes u8[E, columns, k * bits / 8]     the code of k in bits k * bits % 32 of its word
    scales [E, columns, blocks]            bf16, or u8 of mxfp4; zeros u8 of the same shape

A lane reads 16 bytes of codes, which one scale belongs to, and what rows of float32 hold there;
the rest is that of gemv.py, for any number of rows. `round_rows` makes such rows: each block of a
row to whole numbers of 8 or 16 bits, and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cuda.activation import Epilogue
from moec.codegen.cuda.gemv import column_of, launch_few_rows, parts_of, row_of_x
from moec.codegen.cuda.instructions import WARP, fma, load_past_cache, warp_greatest
from moec.codegen.cuda.layout import GROUP
from moec.codegen.cuda.product import HALVES, Product, arguments
from moec.codegen.cuda.tiles import ExpertRows
from moec.codegen.specs.products import QuantisedSpec
from moec.errors import NoMatch
from moec.formats.integer import TINY, most_of
from moec.target.cuda import CudaTarget

_ROWS = 2
_WORDS = 4
_BYTES = 16


@dataclass(frozen=True)
class _Codes:
    scales: Buffer
    zeros: Buffer | None


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """u8[.., k], one code each -> u8[.., k * bits / 8]."""
    if bits == 8:
        return codes
    return np.ascontiguousarray(codes[..., ::2] | codes[..., 1::2] << 4)


def check_codes(spec: QuantisedSpec, epilogue: Epilogue | None) -> None:
    """Raises NoMatch for what the kernel cannot do."""
    piece = _BYTES * 8 // spec.format.bits
    if spec.dtype not in (*HALVES, "float32"):
        raise NoMatch(f"its result is {spec.dtype}")
    if spec.k // spec.format.blocks(spec.k) % piece:
        raise NoMatch(f"{piece} codes, which are read at once, would have two scales")
    if spec.n % (GROUP if spec.gated else 2):
        raise NoMatch(f"its {spec.n} columns cannot be stored as pairs")
    if spec.gated and epilogue is None:
        raise NoMatch("gate and up need an epilogue that joins them")


def product_of_codes(
    spec: QuantisedSpec,
    target: CudaTarget,
    *,
    epilogue: Epilogue | None = None,
    top_k: int = 0,
    blocks: int = 0,
    name: str = "codes",
) -> PrimFunc:
    """A kernel (scales[, zeros], x f32[R or T, k][, order], ends, codes[, bias], y[R, n]).

    `spec.dtype` is that of bias and y. Raises NoMatch for what it cannot do.
    """
    check_codes(spec, epilogue)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tir.noalias": True})
            scale_type = "uint8" if spec.format.kind == "mxfp4" else "bfloat16"
            columns = spec.n * (2 if spec.gated else 1)
            shape = (spec.groups, columns, spec.format.blocks(spec.k))
            scales = T.match_buffer(T.arg("scales", T.handle()), shape, scale_type)
            zeros = None
            if spec.format.asymmetric:
                zeros = T.match_buffer(T.arg("zeros", T.handle()), shape, "uint8")
            width = spec.k * spec.format.bits // 8
            p = arguments(spec, epilogue, top_k, x_dtype="float32", stored=("uint8", width))
            add = partial(_accumulate, _Codes(scales, zeros))
            launch_few_rows(p, target, blocks, _ROWS, add)
    return builder.get()


def _accumulate(
    codes: _Codes, p: Product, owned: ExpertRows, column: Expr, lane: Expr, sums: Buffer
) -> None:
    spec = p.spec
    assert isinstance(spec, QuantisedSpec)
    parts, format = parts_of(spec), spec.format
    each = 32 // format.bits  # codes of a word
    expert = T.bind(T.cast(owned.expert, "int64"))  # 32 bits do not hold E * n * k
    rows = [row_of_x(p, owned, row) for row in range(_ROWS)]
    words = T.alloc_buffer((parts * _WORDS,), "uint32", scope="local")
    scales = T.alloc_buffer((2 * parts,), "float32", scope="local")  # and zeros
    x = T.alloc_buffer((_ROWS * each,), "uint32", scope="local")
    piece = _WORDS * each
    with T.serial(0, -(-spec.k // (WARP * piece))) as turn:
        k = T.bind((turn * WARP + lane) * piece)
        with T.If(k < spec.k), T.Then():
            block = T.bind(k // (spec.k // format.blocks(spec.k)))
            for part in range(parts):
                at = T.bind(column_of(part, column))
                targets = [words[part * _WORDS + i] for i in range(_WORDS)]
                load_past_cache(targets, p.w.ptr_to([expert, at, k * format.bits // 8]))
                T.buffer_store(scales, _scale(format.kind, codes.scales[expert, at, block]), [part])
                zero: Expr = T.float32(1 << (format.bits - 1))
                if codes.zeros is not None:
                    zero = T.cast(codes.zeros[expert, at, block], "float32")
                T.buffer_store(scales, zero, [parts + part])
            for i in range(_WORDS):
                for row in range(_ROWS):
                    for quarter in range(0, each, 4):
                        first = row * each + quarter
                        pointer = [T.cast(rows[row], "int64"), k + (i * each + quarter)]
                        load_past_cache([x[first + j] for j in range(4)], p.x.ptr_to(pointer))
                for part in range(parts):
                    word = words[part * _WORDS + i]
                    for j in range(each):
                        zero = scales[parts + part]
                        w = T.bind(_weight(format.kind, format.bits, word, j, zero) * scales[part])
                        for row in range(_ROWS):
                            index = row * parts + part
                            value = T.reinterpret("float32", x[row * each + j])
                            T.buffer_store(sums, fma(value, w, sums[index]), [index])


def _weight(kind: str, bits: int, word: Expr, index: int, zero: Expr) -> Expr:
    """The weight of one code of a word, without its scale."""
    shifted = T.shift_right(word, T.uint32(bits * index)) if index else word
    code = T.bitwise_and(shifted, T.uint32((1 << bits) - 1))
    if kind != "mxfp4":
        return T.cast(code, "float32") - zero
    # Exponent and mantissa of e2m1 as those of a float32, whose bias is 126 larger.
    magnitude = T.shift_left(T.bitwise_and(code, T.uint32(7)), T.uint32(22))
    sign = T.shift_left(T.bitwise_and(code, T.uint32(8)), T.uint32(28))
    return T.reinterpret("float32", T.bitwise_or(magnitude, sign)) * T.float32(2.0**126)


def _scale(kind: str, stored: Expr) -> Expr:
    if kind != "mxfp4":
        return T.cast(stored, "float32")
    exponent = T.cast(stored, "uint32")
    bits = T.Select(exponent == 0, T.uint32(1 << 22), T.shift_left(exponent, T.uint32(23)))
    return T.reinterpret("float32", bits)


def round_rows(
    width: int, blocks: int, bits: int, dtype: str, target: CudaTarget, name: str = "round_rows"
) -> PrimFunc:
    """A kernel (x[R, width], y f32[R, width]): `formats.integer.round_rows`, a warp a block."""
    size, warps, most = width // blocks, 4, most_of(bits)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tir.noalias": True})
            rows = T.int32()
            x = T.match_buffer(T.arg("x", T.handle()), (rows, width), dtype)
            y = T.match_buffer(T.arg("y", T.handle()), (rows, width), "float32")
            grid = T.launch_thread("blockIdx.x", T.max((rows * blocks + (warps - 1)) // warps, 1))
            with grid as block, T.launch_thread("threadIdx.x", warps * WARP) as thread:
                number = T.bind(block * warps + thread // WARP)
                with T.If(number < rows * blocks), T.Then():
                    row = T.bind(T.cast(number // blocks, "int64"))
                    _round(x, y, row, T.bind(number % blocks * size), size, thread % WARP, most)
    return builder.get()


def _round(
    x: Buffer, y: Buffer, row: Expr, start: Expr, size: int, lane: Expr, most: float
) -> None:
    """A NaN or an infinity makes the whole block NaN."""
    greatest = T.alloc_buffer((2,), "float32", scope="local")  # and one that is not finite
    T.buffer_store(greatest, T.float32(0), [0])
    T.buffer_store(greatest, T.float32(0), [1])
    turns = -(-size // WARP)
    with T.serial(0, turns) as turn:
        at = T.bind(turn * WARP + lane)
        with T.If(at < size), T.Then():
            value = T.bind(T.cast(x[row, start + at], "float32"))
            T.buffer_store(greatest, T.max(greatest[0], T.fabs(value)), [0])
            exponent = T.bitwise_and(T.reinterpret("uint32", value), T.uint32(0x7F800000))
            finite = exponent != T.uint32(0x7F800000)
            broken = T.Select(finite, T.float32(0), T.float32(1))
            T.buffer_store(greatest, T.max(greatest[1], broken), [1])
    top, broken = warp_greatest(greatest[0]), warp_greatest(greatest[1])
    inverse = T.bind(T.Select(top > T.float32(TINY), T.float32(most) / top, T.float32(0)))
    nan = T.reinterpret("float32", T.uint32(0x7FC00000))
    scale = T.bind(T.Select(broken == T.float32(0), top * T.float32(1 / most), nan))
    with T.serial(0, turns) as turn:
        at = T.bind(turn * WARP + lane)
        with T.If(at < size), T.Then():
            value = T.cast(x[row, start + at], "float32") * inverse
            rounded = T.call_extern("float32", "rintf", value)
            T.buffer_store(y, rounded * scale, [row, start + at])
