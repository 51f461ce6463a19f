"""Generated loops on a GPU: one thread computes one element or one row.

    elements    thread i of the grid computes element i
    rows        thread i computes row i, and reduces it in order
    alone       one thread of one block: for writes that must follow one another

Every nest of loops is a separate launch, so it sees the writes of the nest before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.backends.cuda.ranked import ranked
from moec.codegen.cpu.frame import kernel
from moec.codegen.fusion import FusionGroup
from moec.codegen.loop_kernel import LoopKernel, write_body
from moec.codegen.loops import index as ix
from moec.codegen.loops.emission import Emission
from moec.codegen.loops.index import Index, Position
from moec.codegen.loops.rules import EMIT
from moec.errors import UnsupportedError
from moec.ir.dims import Dim, product
from moec.ir.graph import Op
from moec.target.cuda import HOST, CudaTarget

THREADS = 256
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
                raise UnsupportedError(f"a thread of a GPU cannot have {size} places of its own")
            count *= size
        if count * 8 > _SCRATCH:
            raise UnsupportedError(f"a thread of a GPU cannot have {count} places of its own")
        return T.alloc_buffer(tuple(sizes), dtype, scope="local")

    @contextmanager
    def alone(self) -> Iterator[None]:
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

    def _each(self, shape: Sequence[Dim], body: Callable[[Position], None]) -> None:
        live = [axis for axis, dim in enumerate(shape) if dim != 1]
        if not live:
            with self.alone():
                body(tuple(ix.const(0) for _ in shape))
            return
        count = self.sizes.expr(product(tuple(shape)))
        blocks = tirx.max((count + (THREADS - 1)) // THREADS, _i(1))  # a grid of 0 is an error
        grid = T.launch_thread("blockIdx.x", T.cast(blocks, "int32"))
        with grid as block, T.launch_thread("threadIdx.x", THREADS) as thread:
            number = T.bind(T.cast(block, "int64") * THREADS + T.cast(thread, "int64"))
            with T.If(number < count), T.Then(), self.scope():
                body(self._position(shape, live, number))

    def _position(self, shape: Sequence[Dim], live: Sequence[int], left: Expr) -> Position:
        at: dict[int, Index] = {}
        for axis in reversed(live):
            expr = left
            if axis != live[0]:
                size = self.sizes.expr(shape[axis])
                expr = T.bind(ix.rest(left, size))
                left = T.bind(ix.quotient(left, size))
            at[axis] = ix.loop(expr, f"axis{axis}", shape[axis])
        return self._full(shape, at)


def _i(value: int) -> Expr:
    return tirx.const(value, "int64")
