"""Ops along one axis that process elements in order: sort, top-k, cumulative sums."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Buffer

from moec.codegen.loops import scalars as sc
from moec.codegen.loops.axes import wrap
from moec.codegen.loops.elements.arithmetic import larger, plus, times
from moec.codegen.loops.emission import Emission
from moec.codegen.loops.index import Index, Position, loop
from moec.codegen.loops.reductions.reduce import better, kept_shape
from moec.codegen.loops.rules import kernel
from moec.codegen.loops.scalars import Scalar
from moec.dtypes import HALVES
from moec.ir.graph import Op, Value
from moec.ir.sizes.dims import Dim

FEW = 64  # up to this k, the best are kept by insertion


def _put(at: Position, axis: int, by: Index) -> Position:
    return (*at[:axis], by, *at[axis + 1 :]) if at else at


def _int(value: int) -> Expr:
    return tirx.const(value, "int64")


def _write(e: Emission, op: Op, at: Position, axis: int, x: Scalar | None, position: Expr) -> None:
    """Writes to (values, indices), or to the indices alone."""
    if len(op.outputs) > 1 and x is not None:
        e.store(op.outputs[0], at, Scalar(op.outputs[0].dtype, x.expr))
    e.store(op.outputs[-1], at, Scalar("i64", T.cast(position, "int64")))


def _cells(e: Emission, x: Value, many: Dim | int) -> Buffer:
    kind = "i8" if x.dtype == "bool" else "f32" if x.dtype in HALVES else x.dtype
    return e.scratch((e.sizes.expr(many),), sc.COMPUTE[kind])


def _get(buffer: Buffer, x: Value, position: Expr) -> Scalar:
    if x.dtype == "bool":
        return Scalar("bool", tirx.NE(buffer[position], tirx.const(0, "int8")))
    return Scalar(x.dtype, buffer[position])


def _set(buffer: Buffer, position: Expr, x: Scalar) -> None:
    T.buffer_store(buffer, T.cast(x.expr, "int8") if x.dtype == "bool" else x.expr, [position])


def _keep_best(e: Emission, op: Op, axis: int, k: int, sign: int) -> None:
    x = op.inputs[0]

    def row(at: Position) -> None:
        values = _cells(e, x, max(k, 1))
        indices = e.scratch((max(k, 1),), "int64")
        spot = e.scratch((1,), "int64")
        zero = _int(0)
        with T.serial(0, e.sizes.expr(x.shape[axis])) as j, e.scope():
            candidate = e.read(x, _put(at, axis, loop(j, f"visit{axis}", x.shape[axis])))
            last = _get(values, x, _int(k - 1))
            with T.If(tirx.Or(j < k, better(candidate, last, sign))), T.Then():
                T.buffer_store(spot, tirx.min(j, _int(k - 1)), [zero])
                # Equal elements stay behind those that came first.
                above = tirx.max(spot[zero] - 1, zero)
                with T.While(
                    tirx.And(spot[zero] > 0, better(candidate, _get(values, x, above), sign))
                ):
                    here = spot[zero]
                    _set(values, here, _get(values, x, here - 1))
                    T.buffer_store(indices, indices[here - 1], [here])
                    T.buffer_store(spot, here - 1, [zero])
                _set(values, spot[zero], candidate)
                T.buffer_store(indices, j, [spot[zero]])
        with T.serial(0, _int(k)) as s, e.scope():
            to = _put(at, axis, loop(s, f"best{axis}", k))
            _write(e, op, to, axis, _get(values, x, s), indices[s])

    e.rows(kept_shape(x.shape, (axis,)), row, x.shape[axis], weight=4)


def _sorted(e: Emission, op: Op, axis: int, number: Dim, sign: int) -> None:
    """The first `number` results of a stable merge sort that starts from runs of one element."""
    x = op.inputs[0]
    size = x.shape[axis]

    def row(at: Position) -> None:
        n = e.sizes.expr(size)
        values = _cells(e, x, size)
        # int64, because LLVM for AVX2 merges two 32-bit stores into one with a wrong index
        # (SIGBUS).
        order = e.scratch((2, n), "int64")
        zero = _int(0)
        state = e.scratch((5,), "int64")  # width, side, left, right, out
        width, side, left, right, out = (_int(i) for i in range(5))

        def put(cell: Expr, value: Expr) -> None:
            T.buffer_store(state, value, [cell])

        with T.serial(0, n) as j, e.scope():
            _set(values, j, e.read(x, _put(at, axis, loop(j, f"visit{axis}", size))))
            T.buffer_store(order, j, [zero, j])
        put(width, _int(1))
        put(side, zero)
        with T.While(state[width] < n):
            runs = tirx.truncdiv(n + 2 * state[width] - 1, 2 * state[width])
            with T.serial(0, T.bind(runs)) as r:
                start = T.bind(2 * state[width] * r)
                middle = T.bind(tirx.min(start + state[width], n))
                stop = T.bind(tirx.min(start + 2 * state[width], n))
                put(left, start)
                put(right, middle)
                put(out, start)
                with T.While(state[out] < stop):
                    # If a run is exhausted, the comparison may read any element: its result is not
                    # used.
                    a = T.bind(order[state[side], tirx.min(state[left], n - 1)])
                    b = T.bind(order[state[side], tirx.min(state[right], n - 1)])
                    first, second = _get(values, x, a), _get(values, x, b)
                    from_right = tirx.And(
                        state[right] < stop,
                        tirx.Or(state[left] >= middle, better(second, first, sign)),
                    )
                    with T.If(from_right):
                        with T.Then():
                            T.buffer_store(order, b, [1 - state[side], state[out]])
                            put(right, state[right] + 1)
                        with T.Else():
                            T.buffer_store(order, a, [1 - state[side], state[out]])
                            put(left, state[left] + 1)
                    put(out, state[out] + 1)
            put(side, 1 - state[side])
            put(width, 2 * state[width])
        with T.serial(0, e.sizes.expr(number)) as s, e.scope():
            index = T.bind(order[state[side], s])
            to = _put(at, axis, loop(s, f"best{axis}", number))
            _write(e, op, to, axis, _get(values, x, index), index)

    e.rows(kept_shape(x.shape, (axis,)), row, size, weight=32)


@kernel("topk", fuses=("self",))
def topk(e: Emission, op: Op) -> None:
    named = e.named(op)
    x, k = op.inputs[0], named["k"]
    sign = 1 if named["largest"] else -1
    if not x.shape:
        with e.run_once():
            _write(e, op, (), 0, e.read(x, ()), _int(0))
        return
    axis = wrap(named["dim"], len(x.shape))
    if isinstance(k, int) and k <= FEW:
        _keep_best(e, op, axis, k, sign)
    else:
        _sorted(e, op, axis, k, sign)


@kernel("sort", "sort.stable", "argsort", "argsort.stable", fuses=("self",))
def sort(e: Emission, op: Op) -> None:
    named = e.named(op)
    x = op.inputs[0]
    if not x.shape:
        with e.run_once():
            _write(e, op, (), 0, e.read(x, ()), _int(0))
        return
    axis = wrap(named["dim"], len(x.shape))
    _sorted(e, op, axis, x.shape[axis], 1 if named["descending"] else -1)


def _cumulative(e: Emission, op: Op, first: Any, step: Any) -> None:
    x, out = op.inputs[0], op.outputs[0]
    kind = "f32" if out.dtype in HALVES else out.dtype
    if not x.shape:
        with e.run_once():
            e.store(out, (), sc.cast(e.read(x, ()), out.dtype))
        return
    axis = wrap(e.named(op)["dim"], len(x.shape))

    def row(at: Position) -> None:
        total = e.cell(first(kind))
        with T.serial(0, e.sizes.expr(x.shape[axis])) as j, e.scope():
            here = _put(at, axis, loop(j, f"run{axis}", x.shape[axis]))
            total.set(step(total.get(), sc.cast(e.read(x, here), kind)))
            e.store(out, here, sc.cast(total.get(), out.dtype))

    e.rows(kept_shape(x.shape, (axis,)), row, x.shape[axis])


@kernel("cumsum", fuses=("self",))
def cumsum(e: Emission, op: Op) -> None:
    _cumulative(e, op, lambda kind: sc.constant(0, kind), plus)


@kernel("cumprod", fuses=("self",))
def cumprod(e: Emission, op: Op) -> None:
    _cumulative(e, op, lambda kind: sc.constant(1, kind), times)


@kernel("cummax", "cummin", fuses=("self",))
def cummax(e: Emission, op: Op) -> None:
    x, (values, indices) = op.inputs[0], op.outputs
    if not x.shape:
        with e.run_once():
            e.store(values, (), e.read(x, ()))
            e.store(indices, (), sc.constant(0, "i64"))
        return
    sign = 1 if op.name == "aten.cummax.default" else -1
    axis = wrap(e.named(op)["dim"], len(x.shape))

    def row(at: Position) -> None:
        best, where = e.cell(sc.constant(0, x.dtype)), e.cell(sc.constant(0, "i64"))
        with T.serial(0, e.sizes.expr(x.shape[axis])) as j, e.scope():
            here = _put(at, axis, loop(j, f"run{axis}", x.shape[axis]))
            candidate = Scalar(best.dtype, e.read(x, here).expr)
            joined = larger(best.get(), candidate, sign)
            # The later of equal elements wins; a NaN stays, and later NaNs replace it.
            same = tirx.Or(tirx.EQ(joined.expr, candidate.expr), sc.is_nan(candidate))
            with T.If(tirx.Or(tirx.EQ(j, _int(0)), same)), T.Then():
                best.set(candidate)
                where.set(Scalar("i64", j))
            e.store(values, here, Scalar(values.dtype, best.get().expr))
            e.store(indices, here, where.get())

    e.rows(kept_shape(x.shape, (axis,)), row, x.shape[axis], weight=2)
