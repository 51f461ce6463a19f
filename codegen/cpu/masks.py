"""Compressed weights as a kernel reads them: a row of weights is a walk over pairs of masks.

A codeword's entry is two masks of up to 28 weights and how far they reach (ternary_dictionary.py);
a word of two planes is two masks of 32 (two_bits.py). As many neighbours of x are one vector of
16-bit integers: each mask lets some of them through, and one instruction adds those to a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.intrinsics import llvm_functions
from moec.codegen.cpu.layout import LinearSpec
from moec.codegen.cpu.product import argument
from moec.codegen.cpu.vector import Vector
from moec.target import Target
from moec.ternary import START, TOGETHER, bytes_of_counts, starts_shape
from moec.ternary_dictionary import CODEWORDS
from moec.two_bits import NEIGHBOURS, words

LANES = 16
"""32-bit sums of a row: two of 32 neighbours of x each, on every target."""
AHEAD = 16
"""Codewords between the one that is decoded and the one whose entry is asked for."""
TABLE = 8 * CODEWORDS
"""Bytes of all entries."""
UNROLLED = 2
"""Codewords with sums of their own: an addition to a sum waits for the one before."""

Take = Callable[[int, Expr, Expr, Expr], None]
"""(which set of sums, word of x, mask, mask)"""


@dataclass(frozen=True)
class CompressedSpec(LinearSpec):
    """As LinearSpec, for weights of `kind`; x is integers, and `dtype` says nothing about it."""

    kind: str = "ternary"
    bytes_of_counts: tuple[int, ...] = (1, 1)
    """In the starts of each stack of ternary weights."""


@dataclass(frozen=True)
class Ternary:
    """stream int16[W], starts uint8[E * n / 32, 36 or 68], grid bfloat16[E, n, 2]; `table`
    int64[65536]."""

    stream: Buffer
    starts: Buffer
    grid: Buffer
    table: Buffer
    target: Target

    @staticmethod
    def of(spec: CompressedSpec, i: int, table: Buffer, target: Target) -> Ternary:
        starts = starts_shape(spec.groups * spec.n, spec.bytes_of_counts[i])
        return Ternary(
            argument(f"stream{i}", (T.int64(),), "int16"),
            argument(f"starts{i}", starts, "uint8"),
            argument(f"grid{i}", (spec.groups, spec.n, 2), "bfloat16"),
            table,
            target,
        )

    def each(self, n: int, group: Expr, column: Expr, take: Take) -> None:
        """Calls `take` for the codewords of a row of weights."""
        place = T.bind(group * n + column)
        inside = T.bind(T.cast(T.truncmod(place, TOGETHER), "int32"))
        where = T.address_of(self.starts[T.truncdiv(place, TOGETHER), 0])
        size = bytes_of_counts([int(size) for size in self.starts.shape])
        start = T.bind(T.call_extern("int32", f"moec_row_start_{size}", where, inside))
        stop = T.bind(start + T.call_extern("int32", f"moec_row_words_{size}", where, inside))
        at = T.alloc_buffer((1,), "int32")
        T.buffer_store(at, T.int32(0), [0])

        def one(word: Expr, turn: int) -> None:
            if self.fetches:
                ahead = T.bind(T.min(word + AHEAD, stop - 1))
                Vector(self.target).prefetch(self.table, [self._code(ahead)])
            entry = T.bind(self.table[self._code(word)])
            here = T.bind(at[0])
            upper = T.bind(T.cast(T.shift_right(entry, T.int64(32)), "int32"))
            b = T.bind(T.bitwise_and(upper, T.int32(0x0FFFFFFF)))
            take(turn, here, T.bind(T.cast(entry, "int32")), b)
            pairs = T.bitwise_and(T.shift_right(upper, T.int32(28)), T.int32(15))
            T.buffer_store(at, here + pairs, [0])

        whole = T.bind(T.truncdiv(stop - start, UNROLLED))
        with T.serial(0, whole) as step:
            for turn in range(UNROLLED):
                one(start + step * UNROLLED + turn, turn)
        with T.serial(0, stop - start - whole * UNROLLED) as step:
            one(start + whole * UNROLLED + step, 0)

    def _code(self, word: Expr) -> Expr:
        return T.bitwise_and(T.cast(self.stream[word], "int32"), T.int32(0xFFFF))

    @property
    def fetches(self) -> bool:
        """Whether entries are asked for ahead: a second-level cache that the table would fill
        holds rows and sums too."""
        return self.target.l2 < 2 * TABLE

    @staticmethod
    def value(least: Expr, greatest: Expr, a: Expr, b: Expr, total: Expr) -> Expr:
        return least * T.cast(a, "float32") + greatest * T.cast(b, "float32")


@dataclass(frozen=True)
class TwoBits:
    """planes int64[E, n, words], grid bfloat16[E, n, 2]."""

    planes: Buffer
    grid: Buffer

    @staticmethod
    def of(spec: LinearSpec, i: int) -> TwoBits:
        return TwoBits(
            argument(f"planes{i}", (spec.groups, spec.n, words(spec.k)), "int64"),
            argument(f"grid{i}", (spec.groups, spec.n, 2), "bfloat16"),
        )

    def each(self, n: int, group: Expr, column: Expr, take: Take) -> None:
        count = int(self.planes.shape[2])

        def one(word: Expr, turn: int) -> None:
            both = T.bind(self.planes[group, column, word])
            b = T.bind(T.cast(T.shift_right(both, T.int64(32)), "int32"))
            take(turn, word * (NEIGHBOURS // 2), T.bind(T.cast(both, "int32")), b)

        with T.serial(0, count // UNROLLED) as step:
            for turn in range(UNROLLED):
                one(step * UNROLLED + turn, turn)
        for word in range(count // UNROLLED * UNROLLED, count):
            one(T.int32(word), 0)

    @staticmethod
    def value(step: Expr, zero: Expr, a: Expr, b: Expr, total: Expr) -> Expr:
        codes = T.cast(a, "float32") + T.float32(2) * T.cast(b, "float32")
        return step * (codes - zero * T.cast(total, "float32"))


Weights = Ternary | TwoBits


def weights(spec: CompressedSpec, target: Target) -> tuple[Weights, ...]:
    """The arguments that hold the one stack of `spec`, or the two of a gated one."""
    halves = range(1 + spec.gated)
    if spec.kind == "2bit":
        return tuple(TwoBits.of(spec, i) for i in halves)
    table = argument("masks", (CODEWORDS,), "int64")
    return tuple(Ternary.of(spec, i, table, target) for i in halves)


def call(v: Vector, dtype: str, name: str, *args: Expr) -> Expr:
    return T.call_extern(dtype, f"moec_{name}_{v.lanes}", *args)


def masked_sum(v: Vector, sums: Expr, x: Expr, mask: Expr) -> Expr:
    """int32x16: `sums` and those of the 32 integers at address `x` that the mask lets through."""
    return call(v, f"int32x{LANES}", "masked_sum", sums, x, mask)


def dot_pairs(v: Vector, sums: Expr, x: Expr, w: Expr) -> Expr:
    """int32x16: `sums` and the dot products of pairs of 16-bit integers."""
    return call(v, f"int32x{LANES}", "dot_pairs", sums, x, w)


def expand(v: Vector, where: Expr, mask: Expr) -> None:
    """Write 32 integers of 16 bits: 1 where the mask has a bit, else 0."""
    T.evaluate(call(v, "int32", "expand", where, mask))


def total(v: Vector, sums: Expr) -> Expr:
    """The sum of the 16 lanes."""
    return T.bind(call(v, "int32", "lanes_total", T.bind(sums)))


def zero(buffer: Buffer) -> None:
    T.buffer_store(buffer, T.broadcast(T.int32(0), LANES), [T.ramp(0, 1, LANES)])


def functions(target: Target) -> AbstractContextManager[object]:
    """The frame that the kernel must be made in."""
    text = llvm_functions(target) + _functions(target)
    return T.attr(tirx.const(0, "int32"), "pragma_import_llvm", text)  # type: ignore[no-any-return]


@cache
def _functions(target: Target) -> str:
    n, two = target.vector_lanes, 2 * LANES
    i, h, w = f"<{LANES} x i32>", f"<{two} x i16>", f"<{two} x i32>"
    declare = ""
    if target.byte_pairs:
        # Where factors are ones, LLVM would see through anything but the instruction's name, and
        # make sums of words one by one.
        declare, add = _pair_sums(target)
    else:
        even = "<" + ", ".join(f"i32 {2 * j}" for j in range(LANES)) + ">"
        odd = "<" + ", ".join(f"i32 {2 * j + 1}" for j in range(LANES)) + ">"
        add = f"""
  %ws = sext {h} %s to {w}
  %wt = sext {h} %t to {w}
  %wp = mul {w} %ws, %wt
  %e = shufflevector {w} %wp, {w} poison, <{LANES} x i32> {even}
  %o = shufflevector {w} %wp, {w} poison, <{LANES} x i32> {odd}
  %both = add {i} %e, %o
  %r = add {i} %acc, %both"""
    return f"""
{declare}
define linkonce_odr {i} @moec_dot_pairs_{n}({i} %acc, {i} %a, {i} %b) alwaysinline {{
  %s = bitcast {i} %a to {h}
  %t = bitcast {i} %b to {h}
{add}
  ret {i} %r
}}
{_masked_sum(target)}
define linkonce_odr i32 @moec_expand_{n}(ptr %p, i32 %mask) alwaysinline {{
  %m = bitcast i32 %mask to <{two} x i1>
  %w = zext <{two} x i1> %m to {h}
  store {h} %w, ptr %p, align 4
  ret i32 0
}}
declare i32 @llvm.vector.reduce.add.v{LANES}i32({i})
define linkonce_odr i32 @moec_lanes_total_{n}({i} %a) alwaysinline {{
  %r = call i32 @llvm.vector.reduce.add.v{LANES}i32({i} %a)
  ret i32 %r
}}
declare i32 @llvm.vector.reduce.add.v{TOGETHER}i32(<{TOGETHER} x i32>)
{_row_starts(1)}{_row_starts(2)}"""


def _masked_sum(target: Target) -> str:
    n, two = target.vector_lanes, 2 * LANES
    i, h = f"<{LANES} x i32>", f"<{two} x i16>"
    if not (target.byte_pairs and n == 8):
        let_through = f"""
  %m = bitcast i32 %mask to <{two} x i1>
  %z = select <{two} x i1> %m, {h} %x, {h} zeroinitializer"""
    else:
        # No instruction makes lanes of bits. One that copies all 32 to each lane leaves bits 0 to
        # 15 in the even words and 16 to 31 in the odd ones: x is brought into the same order.
        order = [j // 2 + LANES * (j % 2) for j in range(two)]
        order = [*order[:8], *order[16:24], *order[8:16], *order[24:]]  # two unpackings
        places = ", ".join(f"i32 {place}" for place in order)
        bits = ", ".join(f"i16 {(1 << place % 16) - (place % 16 == 15) * 65536}" for place in order)
        let_through = f"""
  %o = shufflevector {h} %x, {h} poison, <{two} x i32> <{places}>
  %e = insertelement {i} poison, i32 %mask, i32 0
  %s = shufflevector {i} %e, {i} poison, {i} zeroinitializer
  %w = bitcast {i} %s to {h}
  %b = and {h} %w, <{bits}>
  %m = icmp eq {h} %b, <{bits}>
  %z = select <{two} x i1> %m, {h} %o, {h} zeroinitializer"""
    ones = "<" + ", ".join(["i16 1"] * two) + ">"
    return f"""
define linkonce_odr {i} @moec_masked_sum_{n}({i} %acc, ptr %p, i32 %mask) alwaysinline {{
  %x = load {h}, ptr %p, align 4{let_through}
  %v = bitcast {h} %z to {i}
  %u = bitcast {h} {ones} to {i}
  %r = call {i} @moec_dot_pairs_{n}({i} %acc, {i} %v, {i} %u)
  ret {i} %r
}}"""


def _pair_sums(target: Target) -> tuple[str, str]:
    """Declarations, and %r = %acc and the sums of pairs of products of %s and %t, on x86."""
    i, h = f"<{LANES} x i32>", f"<{2 * LANES} x i16>"
    if target.vector_lanes == LANES and target.int8_dot:  # avx512vnni holds both
        dot = "@llvm.x86.avx512.vpdpwssd.512"
        return (
            f"declare {i} {dot}({i}, {h}, {h})",
            f"  %r = call {i} {dot}({i} %acc, {h} %s, {h} %t)",
        )
    if target.vector_lanes == LANES:
        dot = "@llvm.x86.avx512.pmaddw.d.512"
        return (
            f"declare {i} {dot}({h}, {h})",
            f"""
  %p = call {i} {dot}({h} %s, {h} %t)
  %r = add {i} %acc, %p""",
        )
    dot, half, sums = "@llvm.x86.avx2.pmadd.wd", f"<{LANES} x i16>", f"<{LANES // 2} x i32>"
    parts = [
        "<" + ", ".join(f"i32 {first + j}" for j in range(LANES)) + ">" for first in (0, LANES)
    ]
    return (
        f"declare {sums} {dot}({half}, {half})",
        f"""
  %s0 = shufflevector {h} %s, {h} poison, <{LANES} x i32> {parts[0]}
  %s1 = shufflevector {h} %s, {h} poison, <{LANES} x i32> {parts[1]}
  %t0 = shufflevector {h} %t, {h} poison, <{LANES} x i32> {parts[0]}
  %t1 = shufflevector {h} %t, {h} poison, <{LANES} x i32> {parts[1]}
  %p0 = call {sums} {dot}({half} %s0, {half} %t0)
  %p1 = call {sums} {dot}({half} %s1, {half} %t1)
  %p = shufflevector {sums} %p0, {sums} %p1, <{LANES} x i32> {parts[0]}
  %r = add {i} %acc, %p""",
    )


def _row_starts(size: int) -> str:
    """How many codewords there are in front of a row of some together, and in it."""
    kind = f"i{8 * size}"
    c, i, m = f"<{TOGETHER} x {kind}>", f"<{TOGETHER} x i32>", f"<{TOGETHER} x i1>"
    places = "<" + ", ".join(f"i32 {j}" for j in range(TOGETHER)) + ">"
    return f"""
define linkonce_odr i32 @moec_row_start_{size}(ptr %p, i32 %inside) alwaysinline {{
  %first = load i32, ptr %p, align 4
  %q = getelementptr i8, ptr %p, i64 {START}
  %c = load {c}, ptr %q, align {size}
  %w = zext {c} %c to {i}
  %x = insertelement {i} poison, i32 %inside, i32 0
  %s = shufflevector {i} %x, {i} poison, {i} zeroinitializer
  %m = icmp ult {i} {places}, %s
  %z = select {m} %m, {i} %w, {i} zeroinitializer
  %t = call i32 @llvm.vector.reduce.add.v{TOGETHER}i32({i} %z)
  %r = add i32 %first, %t
  ret i32 %r
}}
define linkonce_odr i32 @moec_row_words_{size}(ptr %p, i32 %inside) alwaysinline {{
  %q = getelementptr i8, ptr %p, i64 {START}
  %e = getelementptr {kind}, ptr %q, i32 %inside
  %c = load {kind}, ptr %e, align {size}
  %r = zext {kind} %c to i32
  ret i32 %r
}}
"""
