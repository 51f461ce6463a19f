"""Loops in which each expert reads the tokens that it chose (expert choice, arXiv 2202.09368).

    v, t = scores.T.topk(C, -1)          [E, C], tokens for each expert, or the transpose
    out.index_add_(0, t[e], expert_e(x[t[e]]) * v[e, :, None])

Every token chooses all experts in a block, without those that did not choose it; the scores of the
others are its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import cast

from moec.dtypes import FLOATS
from moec.ir.graph import Attr, DType, TensorType, Value
from moec.ir.sizes.dims import Dim
from moec.ir.traits import CASTS, VIEWS
from moec.passes.proof.input_generators import ChosenRows, Feed
from moec.passes.recognise.forms.branches.every_expert import all_experts
from moec.passes.recognise.forms.loops.masks_of_experts import OpenExperts, as_rows
from moec.passes.recognise.region import RegionEmitter, Scope
from moec.passes.recognise.routers.evidence import Evidence
from moec.passes.recognise.routers.routing_weights import dense_weights, unweighted_dropped

_RANKINGS = ("aten.topk.default", "aten.sort.default", "aten.sort.stable")
"""Ops whose indices along an axis are distinct."""


def chosen_by_experts(
    scope: Scope, evidence: Evidence, uses: Sequence[Mapping[str, Sequence[Value]]]
) -> Iterator[OpenExperts]:
    """Hypotheses for the experts that use the values `uses`, by their roles."""
    tokens, experts = evidence.rows_in, evidence.experts
    rows, axis = _table(scope, [use.get("order", ()) for use in uses])
    if rows is None or not _distinct(scope, rows, 1 - axis):
        return
    at_rows = partial(_at_rows, rows, axis, tokens)
    ids = unweighted_dropped(all_experts(tokens, experts), partial(at_rows, None), experts)
    feeds: dict[Value, Feed] = {rows: ChosenRows(tokens, 1 - axis)}
    for role in ("weights", "mix"):
        weights, other = _table(scope, [use.get(role, ()) for use in uses])
        if weights is not None and weights.dtype in FLOATS and other == axis:
            if weights.shape == rows.shape:
                yield OpenExperts(ids, partial(at_rows, weights), (rows, weights), feeds)
    for weights in dense_weights(scope, evidence.values("weights", "mix"), evidence):
        recipe = partial(as_rows, weights, tokens, experts)
        yield OpenExperts(ids, recipe, (rows, weights), feeds)
    yield OpenExperts(ids, None, (rows,), feeds)


def _distinct(scope: Scope, rows: Value, axis: int) -> bool:
    """Whether the elements along an axis are distinct, as those of a ranking are."""
    ranking = scope.made_by(scope.source_of(rows, ("aten.slice.Tensor",)), *_RANKINGS)
    return ranking is not None and cast(int, ranking.attrs.get("dim", -1)) % 2 == axis


def _table(scope: Scope, uses: Sequence[Sequence[Value]]) -> tuple[Value | None, int]:
    """The value, [E, C] or [C, E], and its axis E, of which expert e uses index e first; None if
    there is none."""
    tables = set()
    for number, values in enumerate(uses):
        source = scope.source_of(values[0], VIEWS | CASTS) if values else None
        select = None if source is None else scope.made_by(source, "aten.select.int")
        if select is None or select.attrs["index"] != number or len(select.inputs[0].shape) != 2:
            return None, 0
        tables.add((select.inputs[0], cast(int, select.attrs.get("dim", 0)) % 2))
    ((table, axis), *others) = tables
    return (table, axis) if not others and table.shape[axis] == len(uses) else (None, 0)


def _at_rows(
    rows: Value, axis: int, tokens: Dim, values: Value | None, emit: RegionEmitter
) -> Value:
    """[T, E]: the values (None: 1) at the rows that experts chose, 0 elsewhere."""
    experts = rows.shape[axis]
    dtype, shape = "f32" if values is None else values.dtype, (experts, tokens)
    full = TensorType(dtype, shape)
    attrs: dict[str, Attr] = {"size": shape, "fill_value": 0, "dtype": DType(dtype)}
    (zeros,) = emit("aten.full.default", [], [full], attrs=attrs)
    operands = [emit.old(value) for value in (rows, values) if value is not None]
    if axis == 1:
        operands = [emit.permute(value, (1, 0)) for value in operands]
    at: dict[str, Attr] = {"dim": 1}
    if values is None:
        (table,) = emit("aten.scatter.value", [zeros, *operands], [full], attrs=at | {"value": 1})
    else:
        (table,) = emit("aten.scatter.src", [zeros, *operands], [full], attrs=at)
    return emit.permute(table, (1, 0))
