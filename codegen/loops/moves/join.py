"""Ops that take each element from one of several sources."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.loops import index as ix
from moec.codegen.loops import scalars as sc
from moec.codegen.loops.axes import offset, replaced, wrap
from moec.codegen.loops.elements.arithmetic import choose
from moec.codegen.loops.emission import Emission, Point
from moec.codegen.loops.index import Index, Position
from moec.codegen.loops.rules import EMIT, LoopRule, moves, point
from moec.codegen.loops.scalars import Scalar
from moec.ir.graph import Op, Value


def branch(p: Point, condition: Expr, yes: Any, no: Any) -> Scalar:
    """One of two operands, of which only the selected one is read."""
    with p.emission.lazily():
        a: Scalar = yes()
    with p.emission.lazily():
        b: Scalar = no()
    imag = None if a.imag is None else T.if_then_else(condition, a.imag, b.imag)
    return Scalar(a.dtype, T.if_then_else(condition, a.expr, b.expr), imag)


def _joined(op: Op, arguments: Any) -> tuple[list[Value], int]:
    """The pieces of a cat without the empty ones that torch ignores, and the axis."""
    rank = len(op.outputs[0].shape)
    pieces = [v for v in arguments["tensors"] if len(v.shape) == rank or v.shape != (0,)]
    return pieces, wrap(arguments["dim"], rank)


@moves("cat", "concatenate", "concat")
def cat(p: Point) -> Scalar:
    pieces, axis = _joined(p.op, p.emission.named(p.op))
    at = p.at[axis]

    def piece(value: Value, start: Index) -> Scalar:
        inside = ix.sub(at, start)
        low = max(0, inside.low) if inside.low is not None else 0
        inside = Index(inside.expr, inside.key, low, inside.high)
        return sc.cast(p.read(value, replaced(p.at, axis, inside)), p.dtype)

    def pick(number: int, start: Index) -> Scalar:
        value = pieces[number]
        stop = ix.add(start, p.size(value.shape[axis]))
        if number == len(pieces) - 1 or (
            at.high is not None and stop.low is not None and at.high < stop.low
        ):
            return piece(value, start)
        if at.low is not None and stop.high is not None and at.low >= stop.high:
            return pick(number + 1, stop)
        if stop.constant is not None:
            p.emission.split(at, stop.constant)
        return branch(
            p, at.expr < stop.expr, lambda: piece(value, start), lambda: pick(number + 1, stop)
        )

    return pick(0, ix.const(0))


def write_cat(e: Emission, op: Op) -> None:
    """A cat as a kernel: one loop nest per piece."""
    pieces, axis = _joined(op, e.named(op))
    start = ix.const(0)
    for value in pieces:

        def body(at: Position, value: Value = value, start: Index = start) -> None:
            x = sc.cast(e.read(value, at), op.outputs[0].dtype)
            e.store(op.outputs[0], replaced(at, axis, ix.add(at[axis], start)), x)

        e.elements(value.shape, body)
        start = ix.add(start, e.sizes.index(value.shape[axis]))


for _name in ("cat", "concatenate", "concat"):
    EMIT[f"aten.{_name}.default"] = LoopRule(
        point=cat, kernel=write_cat, cost=0, same_position=False, exact=True, fuses=("tensors",)
    )


@moves("stack")
def stack(p: Point) -> Scalar:
    axis = wrap(p["dim"], len(p.at))
    at, inner = p.at[axis], (*p.at[:axis], *p.at[axis + 1 :])
    pieces = p["tensors"]

    def pick(number: int) -> Scalar:
        if number == len(pieces) - 1 or at.constant == number:
            return sc.cast(p.read(pieces[number], inner), p.dtype)
        if at.low is not None and at.low > number:
            return pick(number + 1)
        p.emission.split(at, number + 1)
        return branch(
            p,
            at.expr < number + 1,
            lambda: sc.cast(p.read(pieces[number], inner), p.dtype),
            lambda: pick(number + 1),
        )

    return pick(0)


def write_stack(e: Emission, op: Op) -> None:
    axis = wrap(e.named(op)["dim"], len(op.outputs[0].shape))
    for number, value in enumerate(e.named(op)["tensors"]):

        def body(at: Position, value: Value = value, number: int = number) -> None:
            x = sc.cast(e.read(value, at), op.outputs[0].dtype)
            e.store(op.outputs[0], (*at[:axis], ix.const(number), *at[axis:]), x)

        e.elements(value.shape, body)


EMIT["aten.stack.default"] = LoopRule(
    point=stack, kernel=write_stack, cost=0, same_position=False, exact=True, fuses=("tensors",)
)


@moves("constant_pad_nd")
def pad(p: Point) -> Scalar:
    value = p["self"]
    at, inside = list(p.at), tirx.const(True, "bool")
    for pair in range(len(p["pad"]) // 2):
        axis = len(at) - 1 - pair
        before = p.emission.sizes.expr(p["pad"][2 * pair])
        size = p.emission.sizes.expr(value.shape[axis])
        position = p.emission.bind_expr(at[axis].expr - before)
        at[axis] = Index(position, ("pad", p.at[axis].key, str(p["pad"][2 * pair])))
        inside = tirx.And(inside, tirx.And(position >= 0, position < size))
    return branch(
        p, inside, lambda: p.read(value, tuple(at)), lambda: sc.constant(p["value"], p.dtype)
    )


@moves("slice_scatter")
def slice_scatter(p: Point) -> Scalar:
    src = p["src"]
    axis = wrap(p["dim"], len(p.at))
    start = offset(p, p["start"], p.shape[axis])
    back = p.emission.bind_expr(p.at[axis].expr - start.expr)
    step = tirx.const(p["step"], "int64")
    position = back if p["step"] == 1 else p.emission.bind_expr(tirx.floordiv(back, step))
    inside = tirx.And(back >= 0, position < p.emission.sizes.expr(src.shape[axis]))
    if p["step"] != 1:
        inside = tirx.And(inside, tirx.EQ(tirx.floormod(back, step), tirx.const(0, "int64")))
    there = Index(position, ("scatter", p.at[axis].key, start.key, p["step"]))
    return branch(
        p,
        inside,
        lambda: sc.cast(p.read(src, replaced(p.at, axis, there)), p.dtype),
        lambda: p.read(p["self"], p.at),
    )


@moves("select_scatter")
def select_scatter(p: Point) -> Scalar:
    axis = wrap(p["dim"], len(p.at))
    position = offset(p, p["index"], p.shape[axis])
    inner = (*p.at[:axis], *p.at[axis + 1 :])
    return branch(
        p,
        tirx.EQ(p.at[axis].expr, position.expr),
        lambda: sc.cast(p.read(p["src"], inner), p.dtype),
        lambda: p.read(p["self"], p.at),
    )


@point("tril", "triu", exact=True, same_position=False)
def triangle(p: Point) -> Scalar:
    above = p.at[-1].expr - p.at[-2].expr
    limit = p.emission.sizes.expr(p["diagonal"])
    inside = above <= limit if p.op.name == "aten.tril.default" else above >= limit
    return choose(inside, p.read(p["self"], p.at), sc.constant(0, p.dtype))
