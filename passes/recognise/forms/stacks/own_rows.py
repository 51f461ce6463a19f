"""Form 10: the position of a row determines its expert; no op chooses among experts.

    rows = x[scores.topk(C, over the tokens)]          [E, C, D], tokens that experts choose
    y = stack([expert_e(rows[e]) for e in range(E)])

The block begins at the rows and ends at the results of the experts. The ops that gather the rows
from tokens and that return results to tokens stay outside. An expert needs at least two products
over a stack: attention heads have a single one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from moec.ir.graph import TensorType, Value
from moec.ir.sizes.dims import Dim, product
from moec.passes.recognise.reading.block import Proposal, Recipe
from moec.passes.recognise.reading.layout import ExpertLayout, divide
from moec.passes.recognise.reading.opnames import PRODUCTS
from moec.passes.recognise.reading.rows import Reader
from moec.passes.recognise.region import RegionEmitter

FORM = "each expert for its own rows"
_MOST = 3
"""How many values after the last product are tried as the result, the farthest first."""


def proposals(reader: Reader, ends: Sequence[tuple[Value, ExpertLayout]]) -> Iterator[Proposal]:
    """Blocks from the rows of `reader` to one of `ends`, where one axis of the rows is the expert
    axis."""
    x, experts = reader.x, reader.writer.experts
    assert x is not None
    assert experts is not None
    rows = [(value, layout) for value, layout in ends if not layout.reduced]
    results = [(value, layout) for value, layout in rows if layout.axes[-1] == layout.features]
    for value, layout in results[:_MOST]:
        body, stacks = reader.body(layout)
        if sum(op.name in PRODUCTS for op in body.ops) < 2:
            continue
        for ids in _numberings(x.shape[:-1], experts):
            yield Proposal(
                form=FORM,
                output=value,
                x=x,
                experts=ids,
                weights=None,
                top_k=1,
                num_experts=experts,
                stacks=stacks,
                body=body,
                cut=(reader.root,),
            )


def _numberings(shape: tuple[Dim, ...], experts: int) -> Iterator[Recipe]:
    """Recipes for the expert id of each row, [R, 1]: one for each axis that may be the expert
    axis."""
    for axis, size in enumerate(shape):
        if size == experts:
            yield partial(_numbered, shape, axis)
    each = divide(shape[0], experts)
    if shape[0] != experts and each is not None:
        yield partial(_numbered, (experts, each, *shape[1:]), 0)


def _numbered(shape: tuple[Dim, ...], axis: int, emit: RegionEmitter) -> Value:
    """The index of each row along `axis`: [R, 1]."""
    count = shape[axis]
    (ids,) = emit("aten.arange.default", [], [TensorType("i64", (count,))], attrs={"end": count})
    column = emit.reshape(ids, [count if i == axis else 1 for i in range(len(shape))])
    return emit.reshape(emit.expand(column, shape), (product(shape), 1))
