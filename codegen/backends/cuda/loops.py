"""Generated loops on a GPU: one thread computes one element, one thread or one warp a row.

    elements    thread i of the grid computes element i
    rows        thread i computes row i, in order
    reductions  warp i reduces row i: each lane a part of it, then the lanes' results by shuffles
    writes      one thread makes all writes to one element, or to elements that no other writes to
    alone       one thread of one block

Every nest of loops is a separate launch, so it sees the writes of the nest before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu.frame import kernel
from moec.codegen.cuda.instructions import WARP, shuffle_xor
from moec.codegen.fusion import FusionGroup
from moec.codegen.loop_kernel import LoopKernel, write_body
from moec.codegen.loops import index as ix
from moec.codegen.loops import scalars as sc
from moec.codegen.loops.axes import wrap
from moec.codegen.loops.cells import Cell, Writes
from moec.codegen.loops.emission import Emission
from moec.codegen.loops.index import Index, Position, loop
from moec.codegen.loops.reductions.reduce import better
from moec.codegen.loops.rules import EMIT
from moec.codegen.loops.scalars import Scalar
from moec.errors import UnsupportedError
from moec.ir.graph import Op, Value
from moec.ir.sizes.dims import Dim, product
from moec.target.cuda import HOST, CudaTarget

# ---- sorting by rank: a thread per element counts the elements that come before it ---
# This takes n^2 comparisons and no memory, which suits rows of hundreds of elements, as models
# sort.


def ranked(e: Emission, op: Op) -> None:
    """sort, argsort, topk: a stable order, whose first elements are the results."""
    named, x, out = e.named(op), op.inputs[0], op.outputs[-1]
    topk = op.name == "aten.topk.default"
    sign = 1 if named["largest" if topk else "descending"] else -1
    axis = wrap(named["dim"], len(x.shape)) if x.shape else 0
    count = e.sizes.expr(out.shape[axis]) if x.shape else tirx.const(1, "int64")

    def element(at: Position) -> None:
        own_value = e.read(x, at)
        before = e.cell(sc.constant(0, "i64"))

        def count_one(other: Position) -> None:
            value = e.read(x, other)
            earlier = tirx.And(
                other[axis].expr < at[axis].expr, tirx.Not(better(own_value, value, sign))
            )
            with T.If(tirx.Or(better(value, own_value, sign), earlier)), T.Then():
                before.set(Scalar("i64", before.get().expr + 1))

        if x.shape:
            with T.serial(0, e.sizes.expr(x.shape[axis])) as j, e.scope():
                count_one((*at[:axis], loop(j, f"other{axis}", x.shape[axis]), *at[axis + 1 :]))
        rank = e.bind_expr(before.get().expr)
        with T.If(rank < count), T.Then():
            to = (*at[:axis], Index(rank, ("rank", axis)), *at[axis + 1 :]) if x.shape else ()
            if len(op.outputs) > 1:
                e.store(op.outputs[0], to, Scalar(op.outputs[0].dtype, own_value.expr))
            index = at[axis].expr if x.shape else tirx.const(0, "int64")
            e.store(out, to, Scalar("i64", index))

    e.elements(x.shape, element)


# ---- a row of a generated loop that the lanes of a warp share ------------------------


@dataclass(frozen=True)
class WarpRow:
    """`lane` is int64."""

    emission: Emission
    lane: Expr

    @contextmanager
    def elements(self, count: Expr) -> Iterator[Expr]:
        """A loop over the numbers below `count` of this lane: lane, lane + 32, ..."""
        turns = tirx.truncdiv(count - self.lane + (WARP - 1), tirx.const(WARP, "int64"))
        with T.serial(0, turns) as turn:
            yield T.bind(self.lane + turn * WARP)

    def merge(self, cells: Sequence[Cell], combine: Callable[[Sequence[Scalar]], None]) -> None:
        """Combines the cells of all lanes by a butterfly: in a fixed order, with the same result in
        every lane."""
        others = [self.emission.cell(cell.get()) for cell in cells]
        for step in (16, 8, 4, 2, 1):
            for cell, other in zip(cells, others, strict=True):
                T.buffer_store(other.buffer, _of_lane(cell.buffer, step), [0])
            combine([other.get() for other in others])


def _of_lane(buffer: Buffer, mask: int) -> Expr:
    """What the lane whose number differs in the bits of `mask` has in its buffer of one element."""
    dtype = str(buffer.dtype)
    wide = dtype if dtype.endswith(("32", "64")) and dtype[0] != "u" else "int32"
    return T.cast(shuffle_xor(T.cast(buffer[0], wide), mask, wide), dtype)


THREADS = 256
FEW = 8
"""The greatest number of elements that one thread reduces."""
_SCRATCH = 1 << 14
"""The most bytes of scratch memory per thread."""

_OWN: Mapping[str, Callable[[Any, Op], None]] = {
    f"aten.{name}": ranked
    for name in (
        *("sort.default", "sort.stable", "argsort.default", "argsort.stable"),
        "topk.default",
    )
}
"""Replacements for loops that need much scratch memory."""


def write(group: FusionGroup, name: str, target: CudaTarget) -> LoopKernel:
    """The kernel of a group."""
    with kernel(name, HOST, s_tir=True) as frame:
        sizes = write_body(group, partial(GridEmission, target=HOST))
    return LoopKernel(frame.function, sizes)


class GridEmission(Emission):
    """Loops over a grid of threads. Only the size of a launch is computed outside of it."""

    vectors = False
    warp: WarpRow | None = None
    """The lanes that share the row being reduced; None in the loops of one thread."""

    def kernel(self, op: Op) -> Callable[[Any, Op], None] | None:
        rule = EMIT[op.name]
        return _OWN.get(op.name, rule.kernel)

    def scratch(self, shape: Sequence[Expr | int], dtype: str) -> Buffer:
        """Registers or local memory of one thread. Raises UnsupportedError if it would be too
        much."""
        sizes = [s.value if isinstance(s, tirx.IntImm) else s for s in shape]
        count = 1
        for size in sizes:
            if not isinstance(size, int):
                raise UnsupportedError(
                    f"a GPU thread cannot have {size} elements of scratch memory"
                )
            count *= size
        if count * 8 > _SCRATCH:
            raise UnsupportedError(f"a GPU thread cannot have {count} elements of scratch memory")
        return T.alloc_buffer(tuple(sizes), dtype, scope="local")

    @contextmanager
    def run_once(self) -> Iterator[None]:
        with T.launch_thread("blockIdx.x", 1), T.launch_thread("threadIdx.x", 1), self.scope():
            yield

    def elements(
        self, shape: Sequence[Dim], body: Callable[[Position], None], weight: int = 1
    ) -> None:
        self._each(shape, body)

    def rows(
        self, shape: Sequence[Dim], body: Callable[[Position], None], work: Dim, weight: int = 1
    ) -> None:
        self._each(shape, body)

    def reductions(
        self, shape: Sequence[Dim], body: Callable[[Position], None], work: Dim, weight: int = 1
    ) -> None:
        if isinstance(work, int) and work <= FEW:
            self._each(shape, body)
            return

        def row(at: Position, lane: Expr) -> None:
            self.warp = WarpRow(self, lane)
            body(at)
            self.warp = None

        self._each_of(shape, WARP, row)

    def visit(self, shape: Sequence[Dim], body: Callable[[Position], None], name: str) -> None:
        if self.warp is None:
            self.serially(shape, body, name)
            return
        warp, self.warp = self.warp, None
        live = [axis for axis, dim in enumerate(shape) if dim != 1]
        with warp.elements(self.sizes.expr(product(tuple(shape)))) as number, self.scope():
            body(self._position(shape, live, number, name))
        self.warp = warp

    def merge(self, cells: Sequence[Cell], combine: Callable[[Sequence[Scalar]], None]) -> None:
        if self.warp is not None:
            self.warp.merge(cells, combine)

    def store(self, value: Value, at: Position, x: Scalar) -> None:
        if self.warp is None:
            super().store(value, at, x)
            return
        with T.If(self.warp.lane == 0), T.Then():  # all lanes have the result of a row
            super().store(value, at, x)

    def writes(self, writes: Writes) -> None:
        apart = product(tuple(writes.shape[axis] for axis in writes.apart))
        together = [axis for axis in range(len(writes.shape)) if axis not in writes.apart]
        if isinstance(apart, int) and apart < WARP:
            self._each(writes.out.shape, lambda into: self._writes_into(writes, into))
            return

        def column(at: Position) -> None:
            def write(inner: Position) -> None:
                full = list(at)
                for axis, index in zip(together, inner, strict=True):
                    full[axis] = index
                self.write(writes, tuple(full))

            self.serially([writes.shape[axis] for axis in together], write, "write")

        self._each([1 if a in together else d for a, d in enumerate(writes.shape)], column)

    def _writes_into(self, writes: Writes, into: Position) -> None:
        self.serially(writes.shape, lambda at: self.write(writes, at, into), "write")

    def _each(self, shape: Sequence[Dim], body: Callable[[Position], None]) -> None:
        self._each_of(shape, 1, lambda at, lane: body(at))

    def _each_of(
        self, shape: Sequence[Dim], lanes: int, body: Callable[[Position, Expr], None]
    ) -> None:
        """Runs body(position, lane) at every position, in each of `lanes` threads."""
        live = [axis for axis, dim in enumerate(shape) if dim != 1]
        if 0 in shape:
            return
        if not live:
            with T.launch_thread("blockIdx.x", 1), T.launch_thread("threadIdx.x", lanes) as lane:
                with self.scope():
                    body(tuple(ix.const(0) for _ in shape), T.cast(lane, "int64"))
            return
        count = self.sizes.expr(product(tuple(shape)))
        per_block = THREADS // lanes
        blocks = tirx.max((count + (per_block - 1)) // per_block, _i(1))  # a grid of 0 is an error
        grid = T.launch_thread("blockIdx.x", T.cast(blocks, "int32"))
        with grid as block, T.launch_thread("threadIdx.x", THREADS) as thread:
            first = T.cast(block, "int64") * per_block
            number = T.bind(first + T.cast(thread // lanes, "int64"))
            with T.If(number < count), T.Then(), self.scope():
                body(self._position(shape, live, number), T.cast(thread % lanes, "int64"))

    def _position(
        self, shape: Sequence[Dim], live: Sequence[int], left: Expr, name: str = "axis"
    ) -> Position:
        at: dict[int, Index] = {}
        for axis in reversed(live):
            expr = left
            if axis != live[0]:
                size = self.sizes.expr(shape[axis])
                expr = T.bind(ix.remainder(left, size))
                left = T.bind(ix.quotient(left, size))
            at[axis] = ix.loop(expr, f"{name}{axis}", shape[axis])
        return self._full(shape, at)


def _i(value: int) -> Expr:
    return tirx.const(value, "int64")
