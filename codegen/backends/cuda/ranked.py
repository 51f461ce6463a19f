"""Sorting by rank: a thread per element counts the elements that come before it.

This takes n^2 comparisons and no memory, which suits rows of hundreds of elements, as models sort.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from moec.codegen.loops import scalars as sc
from moec.codegen.loops.axes import wrap
from moec.codegen.loops.emission import Emission
from moec.codegen.loops.index import Index, Position, loop
from moec.codegen.loops.reductions.reduce import better
from moec.codegen.loops.scalars import Scalar
from moec.ir.graph import Op


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
