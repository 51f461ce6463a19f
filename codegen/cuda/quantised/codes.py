"""Weights of few bits: how codes are packed, and how they are decoded in registers.

    int8, int4   w = (code - zero) * scale          zero 2^(bits-1), or one per block
    fp8          w = e4m3(code) * scale             OCP 8-bit Floating Point 1.0
    mxfp4        w = e2m1(code) * 2^(scale - 127)   OCP Microscaling Formats 1.0

    codes u8[E, columns, k * bits / 8]     16 bytes hold one `piece`: codes of consecutive k
    scales [E, columns, blocks]            bf16, or u8 for mxfp4; zeros u8 of the same shape

Word q of a piece holds the codes that lane 4c + q of a warp multiplies in column c, one step of
`mma.m16n8k16` after the other: of each 16 of k, the codes 2q, 2q + 1, 2q + 8 and 2q + 9. The two
codes of a pair are 16 bits apart, so one `and` leaves them in the two halves of a register;
`ldmatrix` distributes the words to the lanes. The decoded value without its scale is exact in
float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cuda.activation import Epilogue
from moec.codegen.cuda.gemm.product import GROUP, HALVES
from moec.codegen.cuda.instructions import fma_pair
from moec.codegen.specs.products import QuantisedSpec
from moec.errors import NoMatch

WORDS = 4
"""Words of 32 bits in a piece of 16 bytes."""
STEP = 16
"""The number of codes of one column that one `mma` multiplies."""
_BLOCKS = (32, 64, 128)
_ONE, _NO = 0x3C003C00, 0x80008000  # pairs of float16: 1, and -0, the neutral addend
_THOUSAND = 0x6400  # 1024 as float16: or-ing an integer below 1024 into its bits adds it
_TWO_TO_8, _TWO_TO_14 = 0x5C005C00, 0x74007400


@dataclass(frozen=True)
class Codes:
    """The buffers that belong to the codes of weights, and the scales of rows."""

    scales: Buffer
    zeros: Buffer | None
    row_scales: Buffer

    def scale(self, kind: str, expert: Expr, column: Expr, block: Expr) -> Expr:
        """One scale, as float32."""
        stored = self.scales[expert, column, block]
        if kind != "mxfp4":
            return T.cast(stored, "float32")
        exponent = T.cast(stored, "uint32")
        bits = T.Select(exponent == 0, T.uint32(1 << 22), T.shift_left(exponent, T.uint32(23)))
        return T.reinterpret("float32", bits)


def piece_of(bits: int) -> int:
    """The number of codes in 16 bytes."""
    return 128 // bits


def place(bits: int, step: int, half: int, second: int) -> int:
    """The index within a word of the code for k = 16 step + 8 half + 2 q + second."""
    return second * (16 // bits) + step * 2 + half


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """u8[.., k], one code per byte -> u8[.., k * bits / 8], packed."""
    piece = piece_of(bits)
    steps = piece // STEP
    # step, half, q, second -> q, second, step, half
    split = codes.reshape(*codes.shape[:-1], -1, steps, 2, WORDS, 2)
    first = split.ndim - 4
    axes = (*range(first), first + 2, first + 3, first, first + 1)
    ordered = split.transpose(axes).reshape(codes.shape)
    if bits == 8:
        return np.ascontiguousarray(ordered)
    return np.ascontiguousarray(ordered[..., ::2] | ordered[..., 1::2] << 4)


def check_codes(spec: QuantisedSpec, epilogue: Epilogue | None) -> None:
    """Raises NoMatch for formats and epilogues that the kernels do not support."""
    if (bits := spec.format.bits) not in (4, 8):
        raise NoMatch(f"its weights have {bits} bits, and kernels for GPUs need 4 or 8")
    if spec.format.float_zeros:
        raise NoMatch("its zeros are floats, and those of kernels for GPUs are codes")
    piece, size = piece_of(spec.format.bits), spec.k // spec.format.blocks(spec.k)
    if spec.dtype not in (*HALVES, "float32"):
        raise NoMatch(f"its result is {spec.dtype}")
    if spec.format.scale_dtype not in ("bf16", "u8"):
        raise NoMatch(f"its scales are {spec.format.scale_dtype}: CUDA kernels read bf16")
    if size % piece:
        raise NoMatch(f"{piece} codes, which are loaded together, would have two scales")
    if size != spec.k and size not in _BLOCKS:
        raise NoMatch(f"its blocks of {size} weights are neither 32, 64 or 128 nor a row")
    if spec.n % (GROUP if spec.gated else 2):
        raise NoMatch(f"its {spec.n} columns cannot be stored as pairs")
    if spec.gated and epilogue is None:
        raise NoMatch("gate and up need an epilogue that joins them")


def zero_pair(bits: int, zero: Expr | None) -> Expr:
    """The uint32 pair that `weight_pair` adds to two int8 or int4 codes, which are offset by
    1024."""
    if zero is None:
        number = 0x8000 | _THOUSAND | 1 << (bits - 1)
        return T.uint32(number << 16 | number)
    both = T.bitwise_or(zero, T.shift_left(zero, T.uint32(16)))
    return T.bitwise_or(both, T.uint32(0x8000_8000 | _THOUSAND << 16 | _THOUSAND))


def weight_pair(
    kind: str, bits: int, word: Expr, index: Expr | int, zero: Expr, target: Expr
) -> None:
    """Writes to `target` a float16 pair: the weights of code `index` and of its partner, 16 bits
    higher."""
    count = T.uint32(index * bits) if isinstance(index, int) else T.cast(index * bits, "uint32")
    shifted = T.shift_right(word, count)
    if kind == "fp8":
        magnitude = T.shift_left(T.bitwise_and(shifted, T.uint32(0x007F007F)), T.uint32(7))
        sign = T.shift_left(T.bitwise_and(shifted, T.uint32(0x00800080)), T.uint32(8))
        # Read as float16, whose exponent bias is 8 greater.
        fma_pair(target, T.bitwise_or(magnitude, sign), T.uint32(_TWO_TO_8), T.uint32(_NO))
        return
    if kind == "mxfp4":
        magnitude = T.shift_left(T.bitwise_and(shifted, T.uint32(0x00070007)), T.uint32(9))
        sign = T.shift_left(T.bitwise_and(shifted, T.uint32(0x00080008)), T.uint32(12))
        # Read as float16, whose exponent bias is 14 greater.
        fma_pair(target, T.bitwise_or(magnitude, sign), T.uint32(_TWO_TO_14), T.uint32(_NO))
        return
    mask = T.uint32(((1 << bits) - 1) * 0x00010001)
    code = T.bitwise_or(T.bitwise_and(shifted, mask), T.uint32(_THOUSAND * 0x00010001))
    fma_pair(target, code, T.uint32(_ONE), zero)
