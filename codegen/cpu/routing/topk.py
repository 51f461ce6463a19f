"""The greatest of some floats, by integer ranks: NaN first, equals in order, each at most once.

A rank orders as its float does, with -0.0 equal to 0.0 and every NaN above infinity. TAKEN is
below all ranks. Buffers of ranks are padded to whole vectors with TAKEN.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.llvm.frame import llvm_frame
from moec.codegen.cpu.vector import Vector

TAKEN = -(2**31)
LOWEST = -0x7F800001  # the rank of -infinity


@dataclass(frozen=True)
class Ranking:
    v: Vector

    def functions(self) -> AbstractContextManager[object]:
        """The frame that makes the functions known: all other calls belong inside it."""
        text = _llvm(self.v.lanes)
        return llvm_frame(text)

    def ranks(self, x: Expr) -> Expr:
        """float32 lanes -> int32 lanes."""
        return self._call(f"int32x{self.v.lanes}", "ranks", x)

    def take(self, ranks: Buffer, found: Buffer) -> Expr:
        """The index of the greatest rank, the first of equals, which becomes TAKEN.

        ranks: int32[n * lanes]; found: int32[2 * lanes], for this function to write in.
        """
        n = self.v.lanes
        lane, second = T.ramp(0, 1, n), T.ramp(n, 1, n)
        T.buffer_store(found, ranks[lane], [lane])
        T.buffer_store(found, T.ramp(T.int32(0), 1, n), [second])
        with T.serial(1, int(ranks.shape[0]) // n) as j:
            x = T.bind(ranks[T.ramp(j * n, 1, n)])
            ids = T.ramp(T.cast(j * n, "int32"), 1, n)
            # Not for an equal one: the earlier stays.
            T.buffer_store(found, T.Select(x > found[lane], ids, found[second]), [second])
            T.buffer_store(found, T.max(x, found[lane]), [lane])
        first = T.bind(self._call("int32", "first", found[lane], found[second]))
        T.buffer_store(ranks, T.int32(TAKEN), [first])
        return first

    def _call(self, dtype: str, name: str, *args: Expr) -> Expr:
        return T.bind(T.call_extern(dtype, f"moec_{name}_{self.v.lanes}", *args))


def float_of(rank: Expr) -> Expr:
    """int32 scalar -> the float32 it ranks."""
    flip = T.bitwise_and(T.shift_right(rank, T.int32(31)), T.int32(2**31 - 1))
    return T.bind(T.reinterpret("float32", T.bitwise_xor(rank, flip)))


def _llvm(n: int) -> str:
    f, i = f"<{n} x float>", f"<{n} x i32>"

    def const(value: int) -> str:
        return "<" + ", ".join([f"i32 {value}"] * n) + ">"

    # Adding 0.0 turns -0.0 into 0.0. Negative floats order backwards as integers: flip them.
    return f"""
declare i32 @llvm.vector.reduce.smax.v{n}i32({i})
declare i32 @llvm.vector.reduce.smin.v{n}i32({i})
define linkonce_odr {i} @moec_ranks_{n}({f} %a) alwaysinline {{
  %x = fadd {f} %a, zeroinitializer
  %b = bitcast {f} %x to {i}
  %s = ashr {i} %b, {const(31)}
  %m = and {i} %s, {const(2**31 - 1)}
  %k = xor {i} %b, %m
  %nan = fcmp uno {f} %a, %a
  %r = select <{n} x i1> %nan, {i} {const(2**31 - 1)}, {i} %k
  ret {i} %r
}}
define linkonce_odr i32 @moec_first_{n}({i} %ranks, {i} %ids) alwaysinline {{
  %top = call i32 @llvm.vector.reduce.smax.v{n}i32({i} %ranks)
  %t0 = insertelement {i} poison, i32 %top, i32 0
  %tops = shufflevector {i} %t0, {i} poison, {i} zeroinitializer
  %equal = icmp eq {i} %ranks, %tops
  %among = select <{n} x i1> %equal, {i} %ids, {i} {const(2**31 - 1)}
  %r = call i32 @llvm.vector.reduce.smin.v{n}i32({i} %among)
  ret i32 %r
}}
"""
