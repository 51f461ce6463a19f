"""Ops that reduce many elements to one: sums and extremes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.loops import index as ix
from moec.codegen.loops import scalars as sc
from moec.codegen.loops.axes import wrap
from moec.codegen.loops.elements.arithmetic import larger, plus, times
from moec.codegen.loops.emission import Emission
from moec.codegen.loops.index import Position
from moec.codegen.loops.rules import kernel
from moec.codegen.loops.scalars import Join, Scalar
from moec.dtypes import FLOATS, HALVES
from moec.ir.graph import Op, Value
from moec.ir.sizes.dims import Dim, product


def axes_of(dims: Any, rank: int) -> tuple[int, ...]:
    if dims is None or dims == ():
        return tuple(range(rank))
    listed = dims if isinstance(dims, tuple) else (dims,)
    return tuple(sorted(wrap(d, rank) for d in listed)) if rank else ()


def kept_shape(shape: Sequence[Dim], axes: Sequence[int]) -> tuple[Dim, ...]:
    return tuple(1 if a in axes else d for a, d in enumerate(shape))


def count(shape: Sequence[Dim], axes: Sequence[int]) -> Dim:
    return product(tuple(shape[a] for a in axes))


def target(value: Value, at: Position, axes: Sequence[int]) -> Position:
    """The position in the output of a reduced element: with or without the reduced axes."""
    if len(value.shape) == len(at):
        return at
    return tuple(i for a, i in enumerate(at) if a not in axes)


def over(
    e: Emission,
    shape: Sequence[Dim],
    at: Position,
    axes: Sequence[int],
    body: Callable[[Position], None],
) -> None:
    """Runs `body` at every position along `axes`; the other axes are as in `at`. Cells that it
    changes must be merged afterwards."""

    def at_reduced(inner: Position) -> None:
        full = list(at)
        for index, axis in enumerate(axes):
            full[axis] = inner[index]
        body(tuple(full))

    e.visit([shape[a] for a in axes], at_reduced, "reduced")


def accumulate(
    e: Emission,
    shape: Sequence[Dim],
    at: Position,
    axes: Sequence[int],
    first: Scalar,
    step: Callable[[Scalar, Position], Scalar],
    join: Join,
) -> Scalar:
    """step(step(first, position 0), position 1)... along `axes`. `join` combines two such results,
    of parts of the positions; `first` must not change what it is joined with."""
    total = e.cell(first)
    over(e, shape, at, axes, lambda full: total.set(step(total.get(), full)))
    e.merge([total], lambda others: total.set(join(total.get(), others[0])))
    return total.get()


def reduce(
    e: Emission,
    op: Op,
    dims: Any,
    first: Scalar,
    step: Join,
    last: Callable[[Scalar, Dim], Scalar] = lambda total, number: total,
    *,
    read_as: str,
    join: Join | None = None,
) -> None:
    """out = last(step(step(first, x0), x1)...). `join` combines results of two parts; the default
    is `step`."""
    x, out = op.inputs[0], op.outputs[0]
    axes = axes_of(dims, len(x.shape))
    number = count(x.shape, axes)

    def row(at: Position) -> None:
        def add(total: Scalar, full: Position) -> Scalar:
            return step(total, sc.cast(e.read(x, full), read_as))

        result = last(accumulate(e, x.shape, at, axes, first, add, join or step), number)
        e.store(out, target(out, at, axes), sc.cast(result, out.dtype))

    e.reductions(kept_shape(x.shape, axes), row, number)


def accumulator(dtype: str) -> str:
    return "f32" if dtype in HALVES else dtype


def in_any_order(a: Scalar, b: Scalar) -> Scalar:
    if a.dtype in FLOATS:
        return Scalar(a.dtype, sc.add_in_any_order(a.expr, b.expr))
    return plus(a, b)


@kernel("sum", "sum.dim_IntList", fuses=("self",))
def sum_(e: Emission, op: Op) -> None:
    kind = accumulator(op.outputs[0].dtype)
    dims = e.named(op).get("dim")
    reduce(e, op, dims, sc.constant(0, kind), in_any_order, read_as=kind)


@kernel("mean", "mean.dim", fuses=("self",))
def mean(e: Emission, op: Op) -> None:
    kind = accumulator(op.outputs[0].dtype)

    def share(total: Scalar, number: Dim) -> Scalar:
        many = sc.cast(Scalar("i64", e.sizes.expr(number)), kind)
        return Scalar(kind, tirx.div(total.expr, many.expr))

    reduce(e, op, e.named(op).get("dim"), sc.constant(0, kind), in_any_order, share, read_as=kind)


@kernel("prod", "prod.dim_int", fuses=("self",))
def prod(e: Emission, op: Op) -> None:
    kind = accumulator(op.outputs[0].dtype)
    reduce(e, op, e.named(op).get("dim"), sc.constant(1, kind), times, read_as=kind)


def _extreme(e: Emission, op: Op, sign: int) -> None:
    kind = accumulator(op.inputs[0].dtype)
    first = sc.lowest(kind) if sign > 0 else sc.greatest(kind)
    dims = e.named(op).get("dim")
    reduce(e, op, dims, first, lambda a, b: larger(a, b, sign), read_as=kind)


@kernel("amax", "max", fuses=("self",))
def amax(e: Emission, op: Op) -> None:
    _extreme(e, op, 1)


@kernel("amin", "min", fuses=("self",))
def amin(e: Emission, op: Op) -> None:
    _extreme(e, op, -1)


@kernel("any", "any.dim", "any.dims", fuses=("self",))
def any_(e: Emission, op: Op) -> None:
    dims = e.named(op).get("dim")
    reduce(e, op, dims, sc.constant(False, "bool"), larger, read_as="bool")


@kernel("all", "all.dim", "all.dims", fuses=("self",))
def all_(e: Emission, op: Op) -> None:
    dims = e.named(op).get("dim")
    first = sc.constant(True, "bool")
    reduce(e, op, dims, first, lambda a, b: larger(a, b, -1), read_as="bool")


def better(a: Scalar, b: Scalar, sign: int) -> Expr:
    """Whether a comes before b in descending (sign 1) or ascending order; NaN is the greatest."""
    ahead = sc.compare("gt" if sign > 0 else "lt", a, b)
    if a.dtype not in FLOATS:
        return ahead
    greater, less = (a, b) if sign > 0 else (b, a)
    return tirx.Or(ahead, tirx.And(sc.is_nan(greater), tirx.Not(sc.is_nan(less))))


def _first_extreme(e: Emission, op: Op, dims: Any, sign: int, values: bool) -> None:
    """The extreme and its index: of equal elements the first, and NaN before all."""
    x = op.inputs[0]
    axes = axes_of(dims, len(x.shape))
    indices = op.outputs[-1]
    zero = sc.constant(0, "i64")

    def precedes(a: Scalar, b: Scalar) -> Expr:
        # Once the best is NaN, it stays the first NaN, for minimum and maximum.
        nan_first = tirx.And(sc.is_nan(a), tirx.Not(sc.is_nan(b)))
        return tirx.Or(better(a, b, 1) if sign > 0 else sc.compare("lt", a, b), nan_first)

    def row(at: Position) -> None:
        kind = x.dtype
        start = sc.lowest(kind) if sign > 0 else sc.greatest(kind)
        best, position = e.cell(start), e.cell(sc.constant(-1, "i64"))

        def visit(full: Position) -> None:
            here = ix.const(0)
            for axis in axes:
                here = ix.add(ix.mul(here, e.sizes.index(x.shape[axis])), full[axis])
            candidate = e.read(x, full)
            candidate = Scalar(best.dtype, candidate.expr)
            wins = tirx.Or(precedes(candidate, best.get()), sc.compare("lt", position.get(), zero))
            with T.If(wins), T.Then():
                best.set(candidate)
                position.set(Scalar("i64", here.expr))

        def join(others: Sequence[Scalar]) -> None:
            (candidate, where), (now, here) = others, (best.get(), position.get())
            tied = tirx.Not(tirx.Or(precedes(now, candidate), sc.compare("lt", here, where)))
            wins = tirx.Or(precedes(candidate, now), tirx.Or(tied, sc.compare("lt", here, zero)))
            with T.If(tirx.And(wins, sc.compare("ge", where, zero))), T.Then():
                best.set(candidate)
                position.set(where)

        over(e, x.shape, at, axes, visit)
        e.merge([best, position], join)
        last = tirx.max(position.get().expr, tirx.const(0, "int64"))
        e.store(indices, target(indices, at, axes), Scalar("i64", last))
        if values:
            out = op.outputs[0]
            e.store(out, target(out, at, axes), Scalar(out.dtype, best.get().expr))

    e.reductions(kept_shape(x.shape, axes), row, count(x.shape, axes), weight=2)


@kernel("argmax", "argmin", fuses=("self",))
def argmax(e: Emission, op: Op) -> None:
    sign = 1 if op.name == "aten.argmax.default" else -1
    _first_extreme(e, op, e.named(op)["dim"], sign, values=False)


@kernel("max.dim", "min.dim", fuses=("self",))
def max_dim(e: Emission, op: Op) -> None:
    sign = 1 if op.name == "aten.max.dim" else -1
    _first_extreme(e, op, e.named(op)["dim"], sign, values=True)
