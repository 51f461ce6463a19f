"""Moments of many elements, and norms: variance, layer norm, vector norms."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.codegen.loops import scalars as sc
from moec.codegen.loops.elements.arithmetic import larger, plus, times
from moec.codegen.loops.emission import Emission
from moec.codegen.loops.index import Position
from moec.codegen.loops.reductions.reduce import (
    accumulate,
    accumulator,
    axes_of,
    count,
    in_any_order,
    kept_shape,
    over,
    reduce,
    target,
)
from moec.codegen.loops.rules import kernel
from moec.codegen.loops.scalars import Scalar
from moec.ir.graph import Op, Value


def moments(
    e: Emission, x: Value, at: Position, axes: Sequence[int], kind: str
) -> tuple[Scalar, Scalar, Scalar]:
    """The mean, the sum of squared deviations from it, and the number of elements."""
    zero = sc.constant(0.0, kind)

    def read(full: Position) -> Scalar:
        return sc.cast(e.read(x, full), kind)

    def add(total: Scalar, full: Position) -> Scalar:
        return in_any_order(total, read(full))

    total = accumulate(e, x.shape, at, axes, zero, add, in_any_order)
    number = sc.cast(Scalar("i64", e.sizes.expr(count(x.shape, axes))), kind)
    middle = e.bind(Scalar(kind, tirx.div(total.expr, number.expr)))

    def add_square(total: Scalar, full: Position) -> Scalar:
        away = e.bind(plus(read(full), middle, -1))
        return in_any_order(total, times(away, away))

    squares = accumulate(e, x.shape, at, axes, zero, add_square, in_any_order)
    return middle, e.bind(squares), number


def _variance(e: Emission, op: Op, root: bool, with_mean: bool) -> None:
    x = op.inputs[0]
    named = e.named(op)
    axes = axes_of(named.get("dim"), len(x.shape))
    kind = accumulator(x.dtype)
    correction = named.get("correction")
    if correction is None:
        correction = 1 if named.get("unbiased", True) else 0

    def row(at: Position) -> None:
        middle, squares, number = moments(e, x, at, axes, kind)
        zero = sc.constant(0.0, kind)
        freedom = larger(plus(number, sc.constant(correction, kind), -1), zero)
        expr = tirx.div(squares.expr, freedom.expr)
        variance = Scalar(kind, T.sqrt(expr) if root else expr)
        out = op.outputs[0]
        e.store(out, target(out, at, axes), sc.cast(variance, out.dtype))
        if with_mean:
            out = op.outputs[1]
            e.store(out, target(out, at, axes), sc.cast(middle, out.dtype))

    e.reductions(kept_shape(x.shape, axes), row, count(x.shape, axes), weight=2)


@kernel("var.correction", "var", "var.dim", "std.correction", "std", "std.dim")
def variance(e: Emission, op: Op) -> None:
    _variance(e, op, op.name.startswith("aten.std"), False)


@kernel("var_mean.correction", "std_mean.correction", "var_mean", "var_mean.dim")
def var_mean(e: Emission, op: Op) -> None:
    _variance(e, op, op.name.startswith("aten.std"), True)


@kernel("native_layer_norm", "layer_norm")
def layer_norm(e: Emission, op: Op) -> None:
    named = e.named(op)
    x = named["input"]
    axes = tuple(range(len(x.shape) - len(named["normalized_shape"]), len(x.shape)))
    kind = accumulator(x.dtype)

    def row(at: Position) -> None:
        middle, squares, number = moments(e, x, at, axes, kind)
        spread = tirx.div(squares.expr, number.expr) + sc.constant(float(named["eps"]), kind).expr
        inverse = e.bind_expr(tirx.div(sc.constant(1.0, kind).expr, T.sqrt(spread)))

        def write(full: Position) -> None:
            away = plus(sc.cast(e.read(x, full), kind), middle, -1)
            y = Scalar(kind, away.expr * inverse)
            inner = full[axes[0] :]
            if named["weight"] is not None:
                y = times(y, sc.cast(e.read(named["weight"], inner), kind))
            if named["bias"] is not None:
                y = plus(y, sc.cast(e.read(named["bias"], inner), kind))
            e.store(op.outputs[0], full, sc.cast(y, op.outputs[0].dtype))

        over(e, x.shape, at, axes, write)
        for out, statistic in zip(op.outputs[1:], (middle, Scalar(kind, inverse)), strict=False):
            e.store(out, at, sc.cast(statistic, out.dtype))

    e.reductions(kept_shape(x.shape, axes), row, count(x.shape, axes), weight=4)


@kernel("linalg_vector_norm", fuses=("self",))
def vector_norm(e: Emission, op: Op) -> None:
    named = e.named(op)
    kind = accumulator(op.outputs[0].dtype)
    order = float(named["ord"])
    if order == 2:
        reduce(
            e,
            op,
            named["dim"],
            sc.constant(0.0, kind),
            lambda a, b: in_any_order(a, times(b, b)),
            lambda total, number: Scalar(kind, T.sqrt(total.expr)),
            read_as=kind,
            join=in_any_order,
        )
    elif math.isinf(order):
        sign = 1 if order > 0 else -1
        first = sc.constant(0.0 if sign > 0 else math.inf, kind)
        step = lambda a, b: larger(a, sc.absolute(b), sign)  # noqa: E731
        reduce(e, op, named["dim"], first, step, read_as=kind)
    else:
        power = sc.constant(order, kind).expr
        root = sc.constant(1 / order, kind).expr if order else None
        reduce(
            e,
            op,
            named["dim"],
            sc.constant(0.0, kind),
            lambda a, b: in_any_order(a, Scalar(kind, T.pow(sc.absolute(b).expr, power))),
            lambda total, number: total if root is None else Scalar(kind, T.pow(total.expr, root)),
            read_as=kind,
            join=in_any_order,
        )
