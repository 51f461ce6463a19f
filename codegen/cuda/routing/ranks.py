"""Maps floats to integers of the same order: NaN is greatest, as in the CPU kernel."""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

LOWEST = -0x7F800001  # the rank of -infinity
TAKEN = -(2**31 - 1)
"""Below all ranks: already chosen, or not an expert. (TVM rejects -2^31 as an int32 in a
comparison.)"""

_NO_SIGN, _INFINITY = 2**31 - 1, 0x7F800000


def rank_of(x: Expr) -> Expr:
    """float32 -> int32 of the same order, with -0.0 equal to 0.0 and NaN above infinity.

    It works on the bits, because a compiler may fold `x != x` to false and x + 0.0 to x.
    """
    bits = T.bind(T.reinterpret("int32", x))
    size = T.bind(T.bitwise_and(bits, T.int32(_NO_SIGN)))
    flip = T.bitwise_and(T.shift_right(bits, T.int32(31)), T.int32(_NO_SIGN))
    ordered = T.Select(size == 0, T.int32(0), T.bitwise_xor(bits, flip))
    is_nan = size > T.int32(_INFINITY)
    return T.bind(T.Select(is_nan, T.int32(_NO_SIGN), ordered))


def float_of(rank: Expr) -> Expr:
    """int32 rank -> the float32 of that rank."""
    flip = T.bitwise_and(T.shift_right(rank, T.int32(31)), T.int32(_NO_SIGN))
    return T.bind(T.reinterpret("float32", T.bitwise_xor(rank, flip)))
