"""Softmax, log-softmax and log-sum-exp."""

from __future__ import annotations

import math

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.codegen.loops import scalars as sc
from moec.codegen.loops.elements.arithmetic import larger, plus
from moec.codegen.loops.elements.functions import exp
from moec.codegen.loops.emission import Emission
from moec.codegen.loops.index import Position
from moec.codegen.loops.reductions.reduce import (
    accumulate,
    axes_of,
    count,
    in_any_order,
    kept_shape,
    over,
    target,
)
from moec.codegen.loops.rules import kernel
from moec.codegen.loops.scalars import Scalar
from moec.ir.graph import Op


def _softmax(e: Emission, op: Op, log: bool, safe: bool = False) -> None:
    x, out = op.inputs[0], op.outputs[0]
    axes = axes_of(e.named(op)["dim"], len(x.shape))
    kind = "f64" if out.dtype == "f64" else "f32"

    def element(full: Position) -> Scalar:
        return Scalar(kind, sc.cast(e.read(x, full), kind).expr)

    def row(at: Position) -> None:
        def greatest(top: Scalar, full: Position) -> Scalar:
            return larger(top, element(full))

        most = e.bind(accumulate(e, x.shape, at, axes, sc.lowest(kind), greatest, larger))
        if safe:  # a row of -inf gives zeros
            none = tirx.EQ(most.expr, sc.constant(-math.inf, kind).expr)
            most = e.bind(Scalar(kind, T.Select(none, sc.constant(0.0, kind).expr, most.expr)))

        def share(full: Position) -> Scalar:
            return Scalar(kind, exp(e.bind(plus(element(full), most, -1))))

        def add(total: Scalar, full: Position) -> Scalar:
            return in_any_order(total, share(full))

        zero = sc.constant(0.0, kind)
        denominator = e.bind(accumulate(e, x.shape, at, axes, zero, add, in_any_order))
        if safe:
            empty = tirx.EQ(denominator.expr, sc.constant(0.0, kind).expr)
            denominator = e.bind(
                Scalar(kind, T.Select(empty, sc.constant(1.0, kind).expr, denominator.expr))
            )
        if log:
            shift = e.bind_expr(most.expr + T.log(denominator.expr))

            def result(full: Position) -> Scalar:
                return Scalar(kind, element(full).expr - shift)
        else:

            def result(full: Position) -> Scalar:
                return Scalar(kind, tirx.div(share(full).expr, denominator.expr))

        over(e, x.shape, at, axes, lambda f: e.store(out, f, sc.cast(result(f), out.dtype)))

    if not x.shape:
        with e.run_once():
            e.store(out, (), sc.constant(0.0 if log else 1.0, out.dtype))
        return
    e.reductions(kept_shape(x.shape, axes), row, count(x.shape, axes), weight=16)


@kernel("_softmax", "softmax.int", "_safe_softmax")
def softmax(e: Emission, op: Op) -> None:
    _softmax(e, op, log=False, safe=op.name == "aten._safe_softmax.default")


@kernel("_log_softmax", "log_softmax.int")
def log_softmax(e: Emission, op: Op) -> None:
    _softmax(e, op, log=True)


@kernel("logsumexp")
def logsumexp(e: Emission, op: Op) -> None:
    x, out = op.inputs[0], op.outputs[0]
    axes = axes_of(e.named(op)["dim"], len(x.shape))
    kind = "f64" if out.dtype == "f64" else "f32"

    def row(at: Position) -> None:
        def read(full: Position) -> Scalar:
            return sc.cast(e.read(x, full), kind)

        def greatest(top: Scalar, full: Position) -> Scalar:
            return larger(top, read(full))

        top = accumulate(e, x.shape, at, axes, sc.lowest(kind), greatest, larger)
        inf = sc.constant(math.inf, kind)
        infinite = tirx.EQ(sc.absolute(top).expr, inf.expr)
        zero = sc.constant(0.0, kind)
        most = e.bind(Scalar(kind, T.Select(infinite, zero.expr, top.expr)))

        def share(full: Position) -> Scalar:
            return Scalar(kind, exp(e.bind(plus(read(full), most, -1))))

        def add(total: Scalar, full: Position) -> Scalar:
            return in_any_order(total, share(full))

        total = accumulate(e, x.shape, at, axes, zero, add, in_any_order)
        logarithm = Scalar(kind, most.expr + T.log(total.expr))
        e.store(out, target(out, at, axes), sc.cast(logarithm, out.dtype))

    e.reductions(kept_shape(x.shape, axes), row, count(x.shape, axes), weight=16)
