"""The first grouped linear gathers rows itself, the last one returns float32.

    rows, order, ends = moe.dispatch(x, experts)      order, slots, ends = moe.sort(experts)
    h = grouped.linear(rows, ends, w1)          ->    h = grouped.linear(x, ends, w1, order)
    y = grouped.linear(h, ends, w2)                   y = grouped.linear(h, ends, w2) <dtype=f32>
    z = moe.combine(y, order, weights)                z = moe.combine(y, slots, weights)

The dispatched rows would be k copies of x, each written and read once. The sum over a token's k
choices is in float32 in both forms; after the pass its terms are in float32 too. An input-side
routing weight (Llama 4) scales the row as it is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.errors import NoMatch
from moec.ir.graph import DType, Op, Program, Value
from moec.ir.opdef import integer
from moec.ir.ops.experts.grouped import GroupedLinear
from moec.ir.sizes.dims import canonical
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass

_SORTED = ("order", "slots", "ends")


@dataclass(frozen=True)
class FuseDispatch(Pass):
    """Gather rows inside the first grouped linear; keep the last one's rows in float32."""

    name: ClassVar[str] = "fuse-dispatch"

    def run(self, program: Program, log: Log) -> Program:
        graph = rewrite(program.graph, sort_choices, log)
        graph = rewrite(graph, gather_rows, log)
        return Program(rewrite(graph, combine_slots, log), program.weights)


def sort_choices(op: Op, b: Builder) -> Sequence[Value] | None:
    """The order and ends of a dispatch come from a sort; its rows stay while an op reads them."""
    if op.name != "moe.dispatch" or "sorted" in op.attrs:
        return None
    count = {"num_experts": op.attrs["num_experts"]}
    order, _, ends = b.emit("moe.sort", [op.inputs[1]], like=op, attrs=count, named=_SORTED)
    attrs = {**op.attrs, "sorted": True}
    rows, _, _ = b.emit("moe.dispatch", op.inputs, like=op, attrs=attrs)
    return rows, order, ends


def gather_rows(op: Op, b: Builder) -> Sequence[Value] | None:
    if op.name != "grouped.linear" or op.attrs.get("gather"):
        return None
    parts = GroupedLinear.of(op)
    dispatch = b.producers.get(parts.x)
    if dispatch is None or dispatch.name != "moe.dispatch":
        return None
    x, experts, *scale = dispatch.inputs
    sort = _sort_of(parts.ends, b)
    if sort is None or sort.inputs[0] is not experts:
        raise NoMatch("the rows were dispatched by other choices than the linear layer's")
    attrs = {**op.attrs, "gather": experts.shape[1]}
    if scale:
        attrs["scaled"] = True
    inputs = [x, parts.ends, *parts.matrices, *parts.biases, sort.outputs[0], *scale]
    return b.emit(op.name, inputs, like=op, attrs=attrs, body=op.body)


def combine_slots(op: Op, b: Builder) -> Sequence[Value] | None:
    if op.name != "moe.combine":
        return None
    rows, order, *rest = op.inputs
    sort = _sort_of(order, b)
    if sort is None or len(order.shape) == 2:
        return None
    last = b.producers.get(rows)
    if last is not None and last.name == "grouped.linear" and len(b.graph.readers[rows]) == 1:
        wide = rows.dtype if rows.dtype == "f64" else "f32"
        attrs = {**last.attrs, "dtype": DType(wide)}
        (rows,) = b.emit(last.name, last.inputs, like=last, attrs=attrs, body=last.body)
    # The shapes differ if each choice counts as a token: rows are reordered, not summed.
    shape = (canonical(op.attrs["tokens"]), integer(op, "k"))
    slots = b.reshape(sort.outputs[1], shape, like=op)
    return b.emit("moe.combine", [rows, slots, *rest], like=op, attrs=op.attrs)


def _sort_of(value: Value, b: Builder) -> Op | None:
    source = b.producers.get(value)
    return source if source is not None and source.name == "moe.sort" else None
