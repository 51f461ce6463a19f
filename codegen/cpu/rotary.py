"""Rotary position embedding on the CPU: each pair of features turned by its position's angle.

    x[B, H, S, D]  cos, sin[B or 1, S, R or R/2]  ->  out[B, H, S, D]

    out[:R/2]  = x1 * cos - x2 * sin        x1, x2: the halves of x[:R], or its even and odd
    out[R/2:R] = x2 * cos + x1 * sin        features (`interleaved`, DeepSeek)
    out[R:]    = x[R:]

Either side may instead have [B, S, H, D], so that the transpose around it costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer, PrimFunc

from moec.codegen.cpu import tasks
from moec.codegen.cpu.dtypes import TVM_DTYPES
from moec.codegen.cpu.tasks import ELEMENT
from moec.codegen.cpu.vector import Vector
from moec.target import Target

Layout = Literal["BHSD", "BSHD"]


@dataclass(frozen=True)
class RotarySpec:
    """`rotated` features of `width` turn; the tables hold one angle a pair, or each twice (as
    cat(angles, angles)), which `table_width` tells."""

    dtype: str
    heads: int
    width: int
    rotated: int
    table_dtype: str
    table_width: int
    table_batch: bool = False
    interleaved: bool = False
    layout: Layout = "BHSD"
    out_layout: Layout = "BHSD"

    def __post_init__(self) -> None:
        if self.rotated % 2 or self.rotated > self.width:
            raise ValueError(f"rotary: {self.rotated} of {self.width} features are no pairs")
        if self.table_width not in (self.rotated, self.rotated // 2):
            raise ValueError(
                f"rotary: tables of {self.table_width} for {self.rotated} rotated features: "
                "expected as many or half"
            )


def rotary(spec: RotarySpec, target: Target, name: str = "rotary") -> PrimFunc:
    """The kernel (x, cos, sin, out), in float32 and rounded once."""
    v = Vector(target)
    with IRBuilder() as ib:
        with T.prim_func():
            T.func_name(name)
            T.func_attr({"global_symbol": name, "tir.noalias": True})
            batch, n = T.int64(), T.int64()

            def argument(name: str, shape: tuple[Expr | int, ...], dtype: str) -> Buffer:
                return T.match_buffer(T.arg(name, T.handle()), shape, TVM_DTYPES[dtype])

            def shape(layout: Layout) -> tuple[Expr | int, ...]:
                return _at(layout, batch, spec.heads, n, spec.width)

            x = argument("x", shape(spec.layout), spec.dtype)
            table = (batch if spec.table_batch else 1, n, spec.table_width)
            cos = argument("cos", table, spec.table_dtype)
            sin = argument("sin", table, spec.table_dtype)
            out = argument("out", shape(spec.out_layout), spec.dtype)
            work = batch * n * (spec.heads * spec.width * ELEMENT)
            with v.functions(), tasks.functions(), tasks.shared(batch * n, work) as task:
                b, s = tasks.divide(task, n)
                row = (b if spec.table_batch else 0, s)
                with T.serial(0, spec.heads) as h:
                    _head(spec, v, x, cos, sin, out, row, (b, h, s))
    return ib.get()


def _at(layout: Layout, b: Expr, h: Expr | int, s: Expr, d: Expr | int) -> tuple[Expr | int, ...]:
    return (b, h, s, d) if layout == "BHSD" else (b, s, h, d)


def _head(
    spec: RotarySpec,
    v: Vector,
    x: Buffer,
    cos: Buffer,
    sin: Buffer,
    out: Buffer,
    row: tuple[Expr | int, Expr],
    where: tuple[Expr, Expr, Expr],
) -> None:
    half = spec.rotated // 2

    def turn(d: Expr | int, count: int) -> None:
        """Pairs d .. d + count."""

        def load(buffer: Buffer, index: tuple[Expr | int, ...]) -> Expr:
            if count == v.lanes:
                return v.load(buffer, index)
            return v.load_tail(buffer, index, T.int32(count))

        def store(place: Expr | int, value: Expr) -> None:
            index = _at(spec.out_layout, *where, place)
            if count == v.lanes:
                v.store(out, index, value)
            else:
                v.store_tail(out, index, value, T.int32(count))

        if spec.interleaved:
            first, second = _pairs(spec, v, x, where, d, count)
        else:
            first = load(x, _at(spec.layout, *where, d))
            second = load(x, _at(spec.layout, *where, half + d))
        c, s = load(cos, (*row, d)), load(sin, (*row, d))
        # A full table may hold different angles for the two of a pair.
        c2, s2 = c, s
        if spec.table_width == spec.rotated and not spec.interleaved:
            c2, s2 = load(cos, (*row, half + d)), load(sin, (*row, half + d))
        store(d, first * c - second * s)
        store(half + d, second * c2 + first * s2)

    with T.serial(0, half // v.lanes) as j:
        turn(j * v.lanes, v.lanes)
    if half % v.lanes:
        turn(half // v.lanes * v.lanes, half % v.lanes)
    with T.serial(0, spec.width - spec.rotated) as j:
        d = spec.rotated + j
        rest = x[_at(spec.layout, *where, d)]
        T.buffer_store(out, rest, list(_at(spec.out_layout, *where, d)))


def _pairs(
    spec: RotarySpec,
    v: Vector,
    x: Buffer,
    where: tuple[Expr, Expr, Expr],
    d: Expr | int,
    count: int,
) -> tuple[Expr, Expr]:
    """The even and the odd features of `count` neighbouring pairs."""
    lane = T.ramp(0, 1, v.lanes)
    sides = [T.alloc_buffer((v.lanes,), "float32") for _ in range(2)]
    for i in range(count):
        for odd, side in enumerate(sides):
            feature = (d + i) * 2 + odd
            T.buffer_store(side, v.scalar(x, _at(spec.layout, *where, feature)), [i])
    return v.bind(sides[0][lane]), v.bind(sides[1][lane])
