"""Rounds rows to integers of 8 or 16 bits, for products with weights of few bits.

    x[R, width] -> scales f32[R, blocks], codes f16[R, planes * width]

A code times its scale is `formats.integer.round_rows` of x. float16 is exact for integers up to
2048, and for multiples of 256 up to 65504. So codes of 8 bits (-127 .. 127) are one plane. Codes of
16 bits are the sum of two planes: a multiple of 256 and the remainder.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cuda.instructions import WARP, argument, kernel, warp_greatest
from moec.ir.formats.integer import TINY, most_of
from moec.target.cuda import CudaTarget


def planes_of(bits: int) -> int:
    """The number of float16 elements that hold a code of 8 or 16 bits."""
    return bits // 8


def round_rows(
    width: int, blocks: int, bits: int, dtype: str, target: CudaTarget, name: str = "round_rows"
) -> PrimFunc:
    """A kernel (x[R, width], scales f32[R, blocks], codes f16[R, planes * width]), one warp per
    block of a row."""
    size, warps = width // blocks, 4
    with kernel(name) as builder:
        rows = T.int32()

        x = argument("x", (rows, width), dtype)
        scales = argument("scales", (rows, blocks), "float32")
        codes = argument("codes", (rows, planes_of(bits) * width), "float16")
        grid = T.launch_thread("blockIdx.x", T.max((rows * blocks + (warps - 1)) // warps, 1))
        with grid as block, T.launch_thread("threadIdx.x", warps * WARP) as thread:
            number = T.bind(block * warps + thread // WARP)
            with T.If(number < rows * blocks), T.Then():
                row = T.bind(T.cast(number // blocks, "int64"))
                block_of_row = T.bind(number % blocks)
                lane = T.bind(thread % WARP)
                inverse, scale = _scale(x, row, block_of_row * size, size, lane, most_of(bits))
                with T.If(lane == 0), T.Then():
                    T.buffer_store(scales, scale, [row, block_of_row])
                with T.serial(0, -(-size // WARP)) as turn:
                    at = T.bind(turn * WARP + lane)
                    with T.If(at < size), T.Then():
                        column = T.bind(block_of_row * size + at)
                        value = T.cast(x[row, column], "float32") * inverse
                        for plane, part in enumerate(_planes(value, bits)):
                            to = [row, column + plane * width]
                            T.buffer_store(codes, T.cast(part, "float16"), to)
    return builder.get()


def _planes(value: Expr, bits: int) -> Sequence[Expr]:
    code = T.bind(_nearest_integer(value))
    if planes_of(bits) == 1:
        return [code]
    high = T.bind(_nearest_integer(code * T.float32(1 / 256)) * T.float32(256))
    return [high, code - high]


def _nearest_integer(value: Expr) -> Expr:
    return T.call_extern("float32", "rintf", value)


def _scale(
    x: Buffer, row: Expr, start: Expr, size: int, lane: Expr, most: float
) -> tuple[Expr, Expr]:
    """The factor that a block is multiplied by, and its scale: NaN if the block has a NaN or an
    infinity."""
    greatest = T.alloc_buffer((2,), "float32", scope="local")  # magnitude; a non-finite value
    T.buffer_store(greatest, T.float32(0), [0])
    T.buffer_store(greatest, T.float32(0), [1])
    with T.serial(0, -(-size // WARP)) as turn:
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
    scale = T.Select(broken == T.float32(0), top * T.float32(1 / most), nan)
    return inverse, T.bind(scale)
