"""Products of each expert's rows, as integers of 16 bits, with that expert's compressed weights,
decoded where they are multiplied.

    ternary   y[r, n] = f(sx[r] * (least[n] * A + greatest[n] * B))
    2bit      y[r, n] = f(sx[r] * step[n] * (A + 2 B - zero[n] * (sum of x)))

A and B are the sums of x under two masks. A codeword's entry is two masks of up to 28 weights and
how far they reach (ternary_dictionary.py); a word of two planes is two masks of 32 (two_bits.py).
As many neighbours of x are one vector of 16-bit integers: each mask lets some of them through,
and one instruction adds those to a sum. Nothing of the weights is ever written to memory. The
entries of consecutive codewords do not wait for each other; only where in x they start does, for
one addition. Sums are of integers, and exact: results depend on neither threads nor other rows.

(The kernel of QMoE, arXiv 2310.16795, section 4.3, gives a warp to each row; a core takes turns
at rows, and the lanes of a vector are the warp.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu.intrinsics import llvm_functions
from moec.codegen.cpu.layout import Layout, LinearSpec
from moec.codegen.cpu.quantised_layout import row_words
from moec.codegen.cpu.tile import Epilogue, Operands, Tile
from moec.codegen.cpu.vector import Vector
from moec.ops.compressed import X_BITS
from moec.target import Target
from moec.ternary_dictionary import CODEWORDS
from moec.two_bits import NEIGHBOURS, words

LANES = 16
"""32-bit sums of a row: two of 32 neighbours of x each, on every target."""
ROWS = 4
"""Rows of x that meet a codeword while it is decoded."""
UNROLLED = 2
"""Codewords with sums of their own: an addition to a sum waits for the one before."""


@dataclass(frozen=True)
class CompressedSpec(LinearSpec):
    """As LinearSpec, for weights of `kind`; x is integers, and `dtype` says nothing about it."""

    kind: str = "ternary"


@dataclass(frozen=True)
class Ternary:
    """stream int16[W], starts int32[E * n + 1], grid bfloat16[E, n, 2]; `masks` int64[65536]."""

    stream: Buffer
    starts: Buffer
    grid: Buffer
    masks: Buffer

    @staticmethod
    def of(spec: LinearSpec, buffer: Callable[..., Buffer], i: int, masks: Buffer) -> Ternary:
        return Ternary(
            buffer(f"stream{i}", (T.int64(),), "int16"),
            buffer(f"starts{i}", (spec.groups * spec.n + 1,), "int32"),
            buffer(f"grid{i}", (spec.groups, spec.n, 2), "bfloat16"),
            masks,
        )

    def each(self, n: int, group: Expr, column: Expr, take: Take) -> None:
        """Calls `take` for the codewords of a row of weights."""
        place = T.bind(group * n + column)
        start, stop = T.bind(self.starts[place]), T.bind(self.starts[place + 1])
        at = T.alloc_buffer((1,), "int32")
        T.buffer_store(at, T.int32(0), [0])

        def one(word: Expr, turn: int) -> None:
            code = T.bitwise_and(T.cast(self.stream[word], "int32"), T.int32(0xFFFF))
            entry = T.bind(self.masks[code])
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

    @staticmethod
    def value(least: Expr, greatest: Expr, a: Expr, b: Expr, total: Expr) -> Expr:
        return least * T.cast(a, "float32") + greatest * T.cast(b, "float32")


@dataclass(frozen=True)
class TwoBits:
    """planes int64[E, n, words], grid bfloat16[E, n, 2]."""

    planes: Buffer
    grid: Buffer

    @staticmethod
    def of(spec: LinearSpec, buffer: Callable[..., Buffer], i: int) -> TwoBits:
        return TwoBits(
            buffer(f"planes{i}", (spec.groups, spec.n, words(spec.k)), "int64"),
            buffer(f"grid{i}", (spec.groups, spec.n, 2), "bfloat16"),
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


Take = Callable[[int, Expr, Expr, Expr], None]
"""(which set of sums, word of x, mask, mask)"""


@dataclass(frozen=True)
class CompressedOperands(Operands):
    """`x` holds pairs of 16-bit integers (round_rows.py); `w` is not read."""

    x_scales: Buffer
    sums: Buffer
    matrices: tuple[Ternary | TwoBits, ...]


@dataclass(frozen=True)
class CompressedTile(Tile):
    """Emits the loops over rows of x, columns and codewords for one tile of columns."""

    operands: CompressedOperands

    def rows(self, group: Expr, tile: Expr, first: Expr, count: Expr) -> None:
        most = ROWS
        with T.serial(0, T.truncdiv(count, T.int64(most))) as i:
            self._some(group, tile, first + i * most, most)
        left = T.bind(T.truncmod(count, T.int64(most)))
        for m in range(1, most):
            with T.If(left == m), T.Then():
                self._some(group, tile, T.bind(first + count - m), m)

    def _some(self, group: Expr, tile: Expr, row: Expr, m: int) -> None:
        """`m` rows from `row` on: each codeword is decoded once for all of them."""
        v, lay, ops = self.vector, self.layout, self.operands
        rows = [T.bind(ops.x_row(row + i)) for i in range(m)]
        factors = [T.bind(ops.x_scales[r, 0]) for r in rows]
        totals = [T.bind(ops.sums[r, 0]) for r in rows]
        made = T.alloc_buffer((m, lay.columns), "float32")
        count = T.bind(T.min(lay.spec.n - tile * lay.width, T.int64(lay.width)))
        for half, matrix in enumerate(ops.matrices):
            with T.serial(0, count) as c:
                column = T.bind(tile * lay.width + c)
                p, q = (v.scalar(matrix.grid, [group, column, side]) for side in range(2))
                for i, (a, b) in enumerate(self._sums(matrix, group, column, rows)):
                    value = matrix.value(p, q, a, b, totals[i])
                    T.buffer_store(made, value * factors[i], [i, half * lay.width + c])
        lanes = T.ramp(0, 1, v.lanes)
        acc = [[T.alloc_buffer((v.lanes,), "float32") for _ in range(lay.vectors)] for _ in rows]
        for i in range(m):
            for j in range(lay.vectors):
                T.buffer_store(acc[i][j], made[i, T.ramp(j * v.lanes, 1, v.lanes)], [lanes])
        self._finish(acc, row, m, group, tile)

    def _sums(
        self, matrix: Ternary | TwoBits, group: Expr, column: Expr, rows: Sequence[Expr]
    ) -> list[tuple[Expr, Expr]]:
        """For each row of x its sums under the two masks of a row of weights."""
        lanes = T.ramp(0, 1, LANES)
        acc = [
            [[T.alloc_buffer((LANES,), "int32") for _ in range(2)] for _ in rows]
            for _ in range(UNROLLED)
        ]
        for buffer in (b for some in acc for own in some for b in own):
            T.buffer_store(buffer, T.broadcast(T.int32(0), LANES), [lanes])

        def take(turn: int, word: Expr, *masks: Expr) -> None:
            for i, row in enumerate(rows):
                where = T.address_of(self.operands.x[row, word])
                for side, mask in enumerate(masks):
                    own = acc[turn][i][side]
                    added = self._call(f"int32x{LANES}", "masked_sum", own[lanes], where, mask)
                    T.buffer_store(own, added, [lanes])

        matrix.each(self.layout.spec.n, group, column, take)

        def total(i: int, side: int) -> Expr:
            added = acc[0][i][side][lanes]
            for turn in range(1, UNROLLED):
                added = added + acc[turn][i][side][lanes]
            return T.bind(self._call("int32", "masked_total", T.bind(added)))

        return [(total(i, 0), total(i, 1)) for i in range(len(rows))]

    def _call(self, dtype: str, name: str, *args: Expr) -> Expr:
        return T.call_extern(dtype, f"moec_{name}_{self.vector.lanes}", *args)


def functions(target: Target) -> AbstractContextManager[object]:
    """The frame that the kernel must be made in."""
    text = llvm_functions(target) + _functions(target)
    return T.attr(tirx.const(0, "int32"), "pragma_import_llvm", text)  # type: ignore[no-any-return]


@cache
def _functions(target: Target) -> str:
    n = target.vector_lanes
    i, h, w = f"<{LANES} x i32>", f"<{2 * LANES} x i16>", f"<{2 * LANES} x i32>"
    ones = "<" + ", ".join(["i16 1"] * 2 * LANES) + ">"
    declare = ""
    if target.int8_dot:  # avx512vnni holds both
        dot = "@llvm.x86.avx512.vpdpwssd.512"
        declare = f"declare {i} {dot}({i}, {h}, {h})"
        add = f"  %r = call {i} {dot}({i} %acc, {h} %s, {h} {ones})"
    else:
        even = "<" + ", ".join(f"i32 {2 * j}" for j in range(LANES)) + ">"
        odd = "<" + ", ".join(f"i32 {2 * j + 1}" for j in range(LANES)) + ">"
        add = f"""
  %w = sext {h} %s to {w}
  %e = shufflevector {w} %w, {w} poison, <{LANES} x i32> {even}
  %o = shufflevector {w} %w, {w} poison, <{LANES} x i32> {odd}
  %both = add {i} %e, %o
  %r = add {i} %acc, %both"""
    return f"""
{declare}
define linkonce_odr {i} @moec_masked_sum_{n}({i} %acc, ptr %p, i32 %mask) alwaysinline {{
  %x = load {h}, ptr %p, align 4
  %m = bitcast i32 %mask to <{2 * LANES} x i1>
  %s = select <{2 * LANES} x i1> %m, {h} %x, {h} zeroinitializer
{add}
  ret {i} %r
}}
declare i32 @llvm.vector.reduce.add.v{LANES}i32({i})
define linkonce_odr i32 @moec_masked_total_{n}({i} %a) alwaysinline {{
  %r = call i32 @llvm.vector.reduce.add.v{LANES}i32({i} %a)
  ret i32 %r
}}
"""


def compressed_linear(
    target: Target,
    spec: CompressedSpec,
    top_k: int = 0,
    epilogue: Epilogue | None = None,
    scale_dtype: str | None = None,
    name: str = "compressed",
) -> PrimFunc:
    """A kernel (codes, scales, sums of x[T, k][, order i32[R]], ends i32[E][, masks i64[65536]],
    the parts of one stack or two[, bias packed][, scale[T, top_k]], y[R, n]).

    With `top_k`, row r of y is made of row order[r] // top_k of x; with 0, R is T. The masks of
    the dictionary come where the kind is ternary.
    """
    if spec.gated and epilogue is None:
        raise ValueError(f"{name}: gate and up need an epilogue that joins them")
    lay, v, experts = Layout(spec, target), Vector(target), spec.groups
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tir.noalias": True})
            t, r = T.int64(), T.int64()
            x_rows = t if top_k else r

            def buffer(name: str, shape: tuple[object, ...], dtype: str) -> Buffer:
                return T.match_buffer(T.arg(name, T.handle()), shape, dtype)

            x = buffer("x", (x_rows, row_words(spec.k, X_BITS)), "int32")
            x_scales = buffer("x_scales", (x_rows, 1), "float32")
            sums = buffer("sums", (x_rows, 1), "int32")
            order = buffer("order", (r,), "int32") if top_k else None
            ends = buffer("ends", (experts,), "int32")
            halves = range(1 + spec.gated)
            matrices: tuple[Ternary | TwoBits, ...]
            if spec.kind == "ternary":
                masks = buffer("masks", (CODEWORDS,), "int64")
                matrices = tuple(Ternary.of(spec, buffer, i, masks) for i in halves)
            else:
                matrices = tuple(TwoBits.of(spec, buffer, i) for i in halves)
            bias = buffer("bias", lay.bias_shape, "float32") if spec.bias else None
            scale = buffer("scale", (t, top_k), scale_dtype) if scale_dtype and top_k else None
            y = buffer("y", (r, spec.n), spec.y_dtype)

            def token(row: Expr) -> Expr:
                return row if order is None else T.cast(T.truncdiv(order[row], top_k), "int64")

            def row_scale(row: Expr) -> Expr:
                assert order is not None
                slot = T.cast(T.truncmod(order[row], top_k), "int64")
                return v.scalar(scale, [token(row), slot])

            operands = CompressedOperands(
                x, x, y, bias, token, None if scale is None else row_scale,
                x_scales, sums, matrices,
            )  # fmt: skip
            tile = CompressedTile(lay, operands, epilogue)
            with functions(target), T.parallel(0, lay.tiles * experts) as unit:
                column = T.bind(T.truncdiv(unit, experts))
                e = T.bind(T.truncmod(unit, experts))
                before = T.if_then_else(e > 0, ends[T.max(e - 1, 0)], 0)
                first = T.bind(T.cast(before, "int64"))
                end = T.bind(T.cast(ends[e], "int64"))
                with T.If(first < end), T.Then():
                    tile.rows(e, column, first, end - first)
                with T.If(e == experts - 1), T.Then():
                    tile.zero_rows(column, end, r - end)
    return builder.get()
