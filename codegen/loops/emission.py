"""One PrimFunc under construction: its buffers, its loops, and the elements it computes.

The loops are those of a CPU: rows in parallel, the last axis innermost. For another kind of target,
a subclass assigns iterations to threads and allocates scratch memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
from tvm import tirx
from tvm.ir import Expr, Var
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.cpu import parallel
from moec.codegen.loops import index as ix
from moec.codegen.loops import scalars as sc
from moec.codegen.loops.cells import Cell, Writes
from moec.codegen.loops.index import Index, Position, Sizes
from moec.codegen.loops.rules import EMIT
from moec.codegen.loops.scalars import Scalar
from moec.dtypes import HALVES
from moec.ir.aten import named
from moec.ir.graph import Op, Value
from moec.ir.sizes.dims import Dim, product
from moec.target.cpu import CpuTarget

# How many additions of tasks.shared one addition in a loop counts as: loops are not always
# vectorised, and their cost is estimated roughly.
SUMS = 64
CHUNK = 8192


class Emission:
    """Computes elements of values at positions, each once per scope, and writes loops.

    `producers` are the fused points; every other value that is read has a buffer. `vectors`:
    whether kernels may use vectors of the target.
    """

    vectors = True

    def __init__(
        self,
        buffers: Mapping[Value, Buffer],
        outputs: Mapping[Value, Buffer],
        producers: Mapping[Value, Op],
        sizes: Sizes,
        target: CpuTarget,
        flat: bool = False,
    ) -> None:
        self.buffers = buffers
        self.outputs = outputs
        self.producers = producers
        self.sizes = sizes
        self.target = target
        self.flat = flat
        self.memos: list[dict[object, Scalar]] = [{}]
        self.binds = True
        self.splits: dict[str, set[int]] = {}
        self.arguments: dict[Op, Mapping[str, Any]] = {}

    # ---- elements ----------------------------------------------------------------------

    def named(self, op: Op) -> Mapping[str, Any]:
        if op not in self.arguments:
            self.arguments[op] = named(op)
        return self.arguments[op]

    def read(self, value: Value, at: Position) -> Scalar:
        """The element of `value` at a position inside its shape."""
        key = (value, tuple(i.key for i in at))
        for memo in reversed(self.memos):
            if key in memo:
                return memo[key]
        if value in self.buffers:
            scalar = sc.load(self.buffers[value], [i.expr for i in at], value.dtype)
        else:
            op = self.producers[value]
            rule = EMIT[op.name]
            assert rule.point is not None
            scalar = rule.point(Point(self, op, value, at))
            assert scalar.dtype == value.dtype, (op, scalar.dtype)
            scalar = scalar if rule.exact else sc.rounded(scalar)
        scalar = self.bind(scalar)
        self.memos[-1][key] = scalar
        return scalar

    def store(self, value: Value, at: Position, x: Scalar) -> None:
        """Writes an element of an output; x has its dtype."""
        assert x.dtype == value.dtype, (value, x.dtype)
        sc.store(self.outputs[value], [i.expr for i in at], x)

    def bind(self, x: Scalar) -> Scalar:
        """x, computed here and once; inside `lazily`, x unchanged."""
        if not self.binds:
            return x
        imag = None if x.imag is None else self.bind_expr(x.imag)
        return Scalar(x.dtype, self.bind_expr(x.expr), imag)

    def bind_expr(self, expr: Expr) -> Expr:
        if not self.binds or isinstance(expr, Var | tirx.IntImm | tirx.FloatImm):
            return expr
        return T.bind(expr)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """A scope, such as the body of a loop: values computed inside are not reused outside."""
        self.memos.append({})
        yield
        self.memos.pop()

    @contextmanager
    def lazily(self) -> Iterator[None]:
        """Expressions made inside are computed only where they are used, as in a branch."""
        before, self.binds = self.binds, False
        with self.scope():
            yield
        self.binds = before

    def split(self, at: Index, where: int) -> None:
        """Requests that the loop over `at` is split at a position where an expression changes."""
        if isinstance(at.key, str) and at.key.startswith("axis"):
            self.splits.setdefault(at.key, set()).add(where)

    def shape(self, value: Value) -> tuple[Dim, ...]:
        return (product(value.shape),) if self.flat else value.shape

    def position(self, value: Value, at: Position, shape: Sequence[Dim]) -> Position:
        """The position of `value` that is read when it is broadcast to `shape`, at position `at` of
        that."""
        value_shape = self.shape(value)
        lead = len(shape) - len(value_shape)
        return tuple(
            ix.const(0) if dim == 1 else at[lead + axis] for axis, dim in enumerate(value_shape)
        )

    # ---- loops -------------------------------------------------------------------------

    def kernel(self, op: Op) -> Callable[[Any, Op], None] | None:
        """The function that writes the loops of this op, if the op has its own loops."""
        return EMIT[op.name].kernel

    def scratch(self, shape: Sequence[Expr | int], dtype: str) -> Buffer:
        """Scratch memory of one task of the enclosing loops."""
        return T.alloc_buffer(shape, dtype, scope="global")

    def cell(self, first: Scalar) -> Cell:
        """A variable of a loop with its first content."""
        dtype = "f32" if first.dtype in HALVES else first.dtype
        stored = "int8" if dtype == "bool" else sc.COMPUTE[dtype]
        cell = Cell(self.scratch((1,), stored), dtype)
        cell.set(Scalar(dtype, first.expr))
        return cell

    def run_once(self) -> AbstractContextManager[None]:
        """A context for statements that run once, in order, outside of all loops."""
        return nullcontext()

    def elements(
        self, shape: Sequence[Dim], body: Callable[[Position], None], weight: int = 1
    ) -> None:
        """Runs `body` at every position: rows in parallel, the last axis innermost."""
        live = [axis for axis, dim in enumerate(shape) if dim != 1]
        if not live:
            self._once(shape, body)
            return
        *outer, inner = live
        if not outer:
            self._one_axis(shape, inner, body, weight)
            return

        def row(at: dict[int, Index]) -> None:
            name = f"axis{inner}"
            size = shape[inner]
            # Axes of one name may differ in size (the pieces of a cat): a cut may be outside of
            # one.
            cuts = [
                c
                for c in sorted(self.splits.get(name, ()))
                if not isinstance(size, int) or c < size
            ]
            stops: list[Dim] = [*cuts, size]
            for start, stop in zip([0, *cuts], stops, strict=True):
                end = tirx.min(self.sizes.expr(stop), self.sizes.expr(size))
                with T.serial(self.sizes.expr(start), end) as j, self.scope():
                    at[inner] = ix.loop(j, f"{name}:{start}" if cuts else name, stop, start)
                    body(self._full(shape, at))

        self._rows(shape, outer, row, product((shape[inner],)), weight)

    def rows(
        self, shape: Sequence[Dim], body: Callable[[Position], None], work: Dim, weight: int = 1
    ) -> None:
        """Runs `body` at every position of `shape`, in parallel; each call processes `work`
        elements."""
        live = [axis for axis, dim in enumerate(shape) if dim != 1]
        if not live:
            self._once(shape, body)
            return
        self._rows(shape, live, lambda at: body(self._full(shape, at)), work, weight)

    def reductions(
        self, shape: Sequence[Dim], body: Callable[[Position], None], work: Dim, weight: int = 1
    ) -> None:
        """Like `rows`, for a body that reads the elements of its row by `visit` into cells, and
        then merges the cells by `merge`. Several threads may share a row."""
        self.rows(shape, body, work, weight)

    def visit(self, shape: Sequence[Dim], body: Callable[[Position], None], name: str) -> None:
        """Runs `body` at every position of a row; each thread of the row has a part of them."""
        self.serially(shape, body, name)

    def merge(self, cells: Sequence[Cell], combine: Callable[[Sequence[Scalar]], None]) -> None:
        """Runs combine(the contents of another thread's cells) until each thread of the row has
        combined all of them. Here a row has one thread."""

    def _once(self, shape: Sequence[Dim], body: Callable[[Position], None]) -> None:
        """Runs `body` at the only position of `shape`."""
        with self.scope():
            body(tuple(ix.const(0) for _ in shape))

    def writes(self, writes: Writes) -> None:
        """Runs writes to computed positions, as if one after another."""
        with self.run_once():
            self.serially(writes.shape, lambda at: self.write(writes, at), "write")

    def write(self, writes: Writes, at: Position, into: Position | None = None) -> None:
        """The write at one position; with `into`, only if it is a write to that element."""
        to, inside = writes.to(at)
        if into is not None:
            for here, there in zip(to, into, strict=True):
                inside = tirx.And(inside, tirx.EQ(here.expr, there.expr))
            to = into
        with T.If(inside), T.Then(), self.scope():
            x = writes.x(at)
            if writes.join is not None:
                old = sc.load(self.outputs[writes.out], [i.expr for i in to], writes.out.dtype)
                x = sc.rounded(writes.join(old, x))
            self.store(writes.out, to, x)

    def serially(self, shape: Sequence[Dim], body: Callable[[Position], None], name: str) -> None:
        """Nested sequential loops, the last axis innermost."""

        def nest(axis: int, at: dict[int, Index]) -> None:
            if axis == len(shape):
                body(self._full(shape, at))
            elif shape[axis] == 1:
                nest(axis + 1, at)
            else:
                with T.serial(0, self.sizes.expr(shape[axis])) as i, self.scope():
                    nest(axis + 1, at | {axis: ix.loop(i, f"{name}{axis}", shape[axis])})

        nest(0, {})

    @staticmethod
    def _full(shape: Sequence[Dim], at: Mapping[int, Index]) -> Position:
        return tuple(at[a] if a in at else ix.const(0) for a in range(len(shape)))

    def _rows(
        self,
        shape: Sequence[Dim],
        outer: Sequence[int],
        row: Callable[[dict[int, Index]], None],
        work: Dim,
        weight: int,
    ) -> None:
        count = product(tuple(shape[a] for a in outer))
        size = self.sizes.expr(count)
        with (
            parallel.parallel_for(size, self._sums(product((count, work)), weight)) as p,
            self.scope(),
        ):
            left, at = p, {}
            for axis in reversed(outer):
                if axis == outer[0]:
                    expr = left
                else:
                    size = self.sizes.expr(shape[axis])
                    expr = T.bind(ix.remainder(left, size))
                    left = T.bind(ix.quotient(left, size))
                at[axis] = ix.loop(expr, f"axis{axis}", shape[axis])
            row(at)

    def _one_axis(
        self, shape: Sequence[Dim], axis: int, body: Callable[[Position], None], weight: int
    ) -> None:
        size = self.sizes.expr(shape[axis])
        chunk = max(256, CHUNK // weight)
        chunks = tirx.truncdiv(size + (chunk - 1), tirx.const(chunk, "int64"))
        with parallel.parallel_for(chunks, self._sums(shape[axis], weight)) as p:
            start = T.bind(p * chunk)
            with T.serial(start, T.bind(tirx.min(start + chunk, size))) as i, self.scope():
                body(self._full(shape, {axis: ix.loop(i, f"axis{axis}", shape[axis])}))

    def _sums(self, elements: Dim, weight: int) -> Expr:
        return self.sizes.expr(elements) * (weight * SUMS)


@dataclass(frozen=True)
class Point:
    """One element of an op's output, for an emitter: `p["name"]` is an argument of the op's
    schema."""

    emission: Emission
    op: Op
    value: Value
    at: Position

    @property
    def dtype(self) -> str:
        return self.value.dtype

    @cached_property
    def shape(self) -> tuple[Dim, ...]:
        return self.emission.shape(self.value)

    def __getitem__(self, name: str) -> Any:
        return self.emission.named(self.op)[name]

    def read(self, value: Value, at: Position) -> Scalar:
        return self.emission.read(value, at)

    def get(self, argument: Any, dtype: str | None = None) -> Scalar:
        """An operand at this position: a Value broadcast to the output, a number, or a size.

        Numbers are not rounded to half types: torch computes with them in float32.
        """
        if isinstance(argument, Value):
            at = self.emission.position(argument, self.at, self.shape)
            scalar = self.read(argument, at)
            return scalar if dtype is None else self.emission.bind(sc.cast(scalar, dtype))
        dtype = dtype or self.dtype
        if isinstance(argument, sympy.Expr):
            return sc.cast(Scalar("i64", self.emission.sizes.expr(argument)), dtype)
        return sc.constant(argument, dtype)

    def size(self, dim: Dim) -> Index:
        return self.emission.sizes.index(dim)
