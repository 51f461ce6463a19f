"""Top-k of floats by integer ranks: NaN is greatest, equal floats are taken in order.

Ranks have the order of their floats, with -0.0 equal to 0.0 and every NaN above infinity. TAKEN is
below all ranks and marks those that were chosen. Buffers of ranks are padded to whole vectors with
TAKEN.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.vector import Vector

TAKEN = -(2**31)
LOWEST = -0x7F800001  # the rank of -infinity


@dataclass(frozen=True)
class Ranking:
    v: Vector

    def ranks(self, x: Expr) -> Expr:
        """float32 lanes -> int32 lanes."""
        return self._call(f"int32x{self.v.lanes}", "ranks", x)

    def take(self, ranks: Buffer, argmax: Buffer) -> Expr:
        """The index of the greatest rank, the first of equals; that rank becomes TAKEN.

        ranks: int32[n * lanes]; argmax: int32[2 * lanes], scratch memory of this function.
        """
        n = self.v.lanes
        lane, second = T.ramp(0, 1, n), T.ramp(n, 1, n)
        T.buffer_store(argmax, ranks[lane], [lane])
        T.buffer_store(argmax, T.ramp(T.int32(0), 1, n), [second])
        with T.serial(1, int(ranks.shape[0]) // n) as j:
            x = T.bind(ranks[T.ramp(j * n, 1, n)])
            ids = T.ramp(T.cast(j * n, "int32"), 1, n)
            # Strictly greater, so that the first of equal ranks wins.
            T.buffer_store(argmax, T.Select(x > argmax[lane], ids, argmax[second]), [second])
            T.buffer_store(argmax, T.max(x, argmax[lane]), [lane])
        first = T.bind(self._call("int32", "first", argmax[lane], argmax[second]))
        T.buffer_store(ranks, T.int32(TAKEN), [first])
        return first

    def _call(self, dtype: str, name: str, *args: Expr) -> Expr:
        return T.bind(T.call_extern(dtype, f"moec_{name}_{self.v.lanes}", *args))


def float_of(rank: Expr) -> Expr:
    """int32 scalar -> the float32 it ranks."""
    flip = T.bitwise_and(T.shift_right(rank, T.int32(31)), T.int32(2**31 - 1))
    return T.bind(T.reinterpret("float32", T.bitwise_xor(rank, flip)))
