"""Vectors of int32 lanes, and the bytes in them: rows to codes, codes to bytes.

A lane holds four consecutive codes along K, the first in the lowest byte; fewer bits are packed as
words.py has it. Codes of weights are unsigned, codes of activations signed; dot_products.py
multiplies them.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.vector import Vector


def rounded(v: Vector, x: Expr, inverse: Expr) -> Expr:
    """x * inverse, rounded to the nearest integer, as int32 lanes; arbitrary integers for NaN."""
    return T.bind(_call(v, f"int32x{v.lanes}", "rounded", x, v.splat(inverse)))


def store_narrow(v: Vector, buffer: Buffer, index: list[Expr], x: Expr, bits: int) -> None:
    """Stores the low `bits` (8 or 16) of int32 lanes to the int32 `buffer`, from `index` on."""
    where = T.address_of(buffer[tuple(index)])
    T.evaluate(_call(v, "int32", f"store_narrow{bits}", where, x))


def signed_bytes(v: Vector, x: Expr) -> list[Expr]:
    """Lanes of -32640 .. 32639 -> a and b of -128 .. 127 for which x = 256 a + b."""
    half = T.broadcast(T.int32(128), v.lanes)
    upper = T.bind(T.shift_right(x + half, T.broadcast(T.int32(8), v.lanes)))
    return [upper, T.bind(x - upper * T.broadcast(T.int32(256), v.lanes))]


def joined(v: Vector, sums: Sequence[Expr]) -> Expr:
    """Integer sums as float32 lanes, from one sum, or from the sums of upper and of lower bytes."""
    first, *lower = [T.bind(T.cast(T.bind(sum), v.dtype)) for sum in sums]
    return T.bind(v.fma(first, v.splat(256.0), lower[0])) if lower else first


def total(v: Vector, x: Expr) -> Expr:
    """The sum of int32 lanes."""
    return T.bind(_call(v, "int32", "total", x))


def minus_128(v: Vector, codes: Expr) -> Expr:
    """Unsigned bytes minus 128, as signed bytes."""
    return T.bind(T.bitwise_xor(codes, T.broadcast(T.int32(0x80808080 - 2**32), v.lanes)))


def masked_bytes(v: Vector, words: Expr, shift: int, mask: int) -> Expr:
    """The bits of `mask` of each byte, after a shift to the right; no bit of another byte may get
    there."""
    if shift:
        words = T.shift_right(words, T.broadcast(T.int32(shift), v.lanes))
    return T.bind(T.bitwise_and(words, T.broadcast(T.int32(mask * 0x01010101), v.lanes)))


def in_all_bytes(v: Vector, bytes: Expr) -> Expr:
    """Lanes below 256 -> lanes with that value in each of their four bytes."""
    return T.bind(bytes * T.broadcast(T.int32(0x01010101), v.lanes))


def minus4(v: Vector, a: Expr, b: Expr) -> Expr:
    """The differences of bytes."""
    return T.bind(_call(v, f"int32x{v.lanes}", "minus4", a, b))


def e2m1(v: Vector, codes: Expr) -> Expr:
    """Bytes with codes of e2m1 -> twice their values, plus `E2M1_ZERO`."""
    return T.bind(_call(v, f"int32x{v.lanes}", "e2m1", codes))


E4M3_UNIT = 256.0  # what `e4m3` leaves to multiply with


def e4m3(v: Vector, words: Expr) -> list[Expr]:
    """Words of four codes (layout.py) -> float32 lanes, codes in order, over E4M3_UNIT."""
    return [T.bind(_call(v, v.dtype, f"e4m3_{i}", words)) for i in range(4)]


def e4m3_pairs(v: Vector, words: Expr, half: int) -> Expr:
    """Words of four codes (layout.py) -> the first or second two as a bf16 pair."""
    return T.bind(_call(v, f"int32x{v.lanes}", f"e4m3_pairs_{half}", words))


def _call(v: Vector, dtype: str, name: str, *args: Expr) -> Expr:
    return T.call_extern(dtype, f"moec_{name}_{v.lanes}", *args)
