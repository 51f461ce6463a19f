"""Rows of a product that all experts share, beside the tokens' rows.

    base = x @ W                                                         once, for all tokens
    t, s = where(ids == e); h = relu(base[t] + b_e(a_e(x[t])))           in each expert (MixLoRA)

An expert reads two rows of a token here. They are dispatched as one row, cat([x, base]), and its
body begins with the slices of that row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Ref, TensorType, Value
from moec.ir.traits import VIEWS
from moec.passes.recognise.reading.body import ROWS
from moec.passes.recognise.reading.layout import Atom, ExpertLayout, regroup
from moec.passes.recognise.reading.opnames import PICKS, PRODUCTS
from moec.passes.recognise.reading.reader import BlockReader
from moec.passes.recognise.region import RegionEmitter


def with_shared_rows(
    reader: BlockReader, op: Op, layouts: Sequence[ExpertLayout | None]
) -> list[ExpertLayout | None]:
    """The layouts of the op's inputs, in which rows of a shared product are rows of the expert."""
    width = op.outputs[0].shape[-1:]
    return [
        _read(reader, value) if layout is None and value.shape[-1:] == width else layout
        for value, layout in zip(op.inputs, layouts, strict=True)
    ]


def _read(reader: BlockReader, value: Value) -> ExpertLayout | None:
    source = shared_product(reader, value)
    if source is None or reader.x is None or not isinstance(source.shape[-1], int):
        return None
    x = reader.memo[reader.x]
    try:
        axes, splits = regroup(x.axes[:-1], source.shape[:-1])
    except NoMatch:
        return None
    if splits:
        return None
    feature = Atom(source.shape[-1], False)
    base = Value(
        f"shared_{len(reader.shared) + 1}", TensorType(source.dtype, (ROWS, source.shape[-1]))
    )
    reader.shared[source] = base
    reader.memo[source] = ExpertLayout(base, (feature,), (*axes, (feature,)))
    reader.opaque_values.clear()  # they were read before this source was one
    return reader.read(value)


def shared_product(reader: BlockReader, value: Value) -> Value | None:
    """The product outside of the branch, or a view of it, whose rows `value` picks with the
    order of the expert's rows; None if `value` has other rows."""
    scope, order = reader.scope, reader.uses.get("order", [])
    if reader.only is None:
        return None
    pick = scope.made_by(scope.source_of(value), *PICKS)
    if (pick is None) != (not order):
        return None
    if pick is not None and not set(pick.inputs[1:]) <= set(order):
        return None
    source = pick.inputs[0] if pick is not None else value
    while scope.maker(source) in reader.only and scope.made_by(source, *VIEWS) is not None:
        source = cast(Op, scope.maker(source)).inputs[0]
    product = scope.made_by(scope.source_of(source), *PRODUCTS)
    if product is None or product in reader.only or len(source.shape) < 2:
        return None
    return source


def from_one_row(body: Graph, shared: Sequence[Value]) -> Graph:
    """The body with one input, in whose rows those of its own input are followed by `shared`."""
    parts = (*body.inputs, *shared)
    widths = [cast(int, part.shape[-1]) for part in parts]
    row = Value("rows", TensorType(parts[0].dtype, (ROWS, sum(widths))))
    starts = [sum(widths[:index]) for index in range(len(widths))]
    slices = tuple(
        Op(
            "aten.slice.Tensor", (row,), (part,),
            {"dim": 1, "start": start, "end": start + width},
        )
        for part, start, width in zip(parts, starts, widths, strict=True)
    )  # fmt: skip
    return replace(body, inputs=(row,), ops=(*slices, *body.ops))


def side_by_side(values: Sequence[Value], emit: RegionEmitter) -> Value:
    """cat(values, 1) of rows [T, ..]."""
    if len(values) == 1:
        return values[0]
    width = sum(cast(int, value.shape[1]) for value in values)
    types = [TensorType(values[0].dtype, (values[0].shape[0], width))]
    tensors = tuple(Ref(index) for index in range(len(values)))
    return emit("aten.cat.default", values, types, attrs={"tensors": tensors, "dim": 1})[0]
