"""Loops in which the column of a table opens an expert for tokens, any number of experts a token.

    t = where(table[:, e] > 0)[0]; out.index_add_(0, t, expert_e(x[t]))     its own rows
    out = out + table[:, e, None] * expert_e(x)                             every token

A threshold on scores makes such tables (DynMoE, arXiv 2405.14297, equations 3 to 6). Every token
chooses all experts in a block, without those that its row of the table closes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

from moec.ir.graph import Attr, Op, TensorType, Value
from moec.ir.sizes.dims import Dim, product
from moec.ir.traits import CASTS, VIEWS
from moec.passes.proof.input_generators import Feed, sparse_feed
from moec.passes.recognise.forms.branches.every_expert import all_experts
from moec.passes.recognise.region import Recipe, RegionEmitter, Scope, choices
from moec.passes.recognise.routers.evidence import Evidence
from moec.passes.recognise.routers.routing_weights import dense_weights, unweighted_dropped

_LISTS = VIEWS | CASTS | {"aten.slice.Tensor", "aten.nonzero.default"}
_COMPARISONS = {f"aten.{name}.Scalar" for name in ("gt", "ge", "lt", "le", "ne")}


@dataclass(frozen=True)
class ExpertTable:
    """`source`, [T, E] or with `axis` 0 [E, T], opens expert e for the tokens whose elements fulfil
    `conditions`, comparisons with a number, one after another."""

    source: Value
    axis: int
    conditions: tuple[tuple[str, Attr], ...]

    def open(self, tokens: Dim, experts: int, emit: RegionEmitter) -> Value:
        """f32[T, E]: 1 where the table opens an expert for a token."""
        value = emit.old(self.source)
        if self.axis == 0:
            value = emit.permute(emit.reshape(value, (experts, tokens)), (1, 0))
        value = emit.reshape(value, (tokens, experts))
        for name, other in self.conditions:
            type = TensorType("bool", value.shape)
            (value,) = emit(name, [value], [type], attrs={"other": other})
        return emit.cast(value, "f32")


@dataclass(frozen=True)
class OpenExperts:
    """A hypothesis: recipes for ids and weights [T, E], and where the region begins."""

    experts: Recipe
    weights: Recipe | None
    cut: tuple[Value, ...]
    feeds: Mapping[Value, Feed]


def _table(scope: Scope, selects: Sequence[Value], tokens: Dim) -> ExpertTable | None:
    """The table whose column e is behind `selects[e]`; None if there is none, or if a top-k among
    the experts makes it, which gives each token a fixed number of them."""
    tables = {_column(scope, value, number) for number, value in enumerate(selects)}
    table = tables.pop() if len(tables) == 1 else None
    if table is None or product(table.source.shape) != product((tokens, len(selects))):
        return None
    ranked = any(
        op.name == "aten.topk.default" and _among(op) == len(selects)
        for op in choices(scope, [table.source])
    )
    return None if ranked else table


def _column(scope: Scope, rows: Value, number: int) -> ExpertTable | None:
    conditions: list[tuple[str, Attr]] = []
    op = scope.maker(rows)
    while op is not None and op.name in _LISTS | _COMPARISONS:
        if op.name in _COMPARISONS:
            conditions.insert(0, (op.name, op.attrs["other"]))
        op = scope.maker(op.inputs[0])
    if op is None or op.name != "aten.select.int" or op.attrs["index"] != number:
        return None
    rank = len(op.inputs[0].shape)
    axis = cast(int, op.attrs.get("dim", 0)) % rank
    if axis not in (0, rank - 1):
        return None
    return ExpertTable(op.inputs[0], axis, tuple(conditions))


def open_experts(
    scope: Scope, evidence: Evidence, uses: Sequence[Mapping[str, Sequence[Value]]]
) -> Iterator[OpenExperts]:
    """Hypotheses for the experts that use the values `uses`, by their roles."""
    tokens, experts = evidence.rows_in, evidence.experts
    role = "order" if uses[0].get("order") else "weights"
    if len(uses) != experts or not all(use.get(role) for use in uses):
        return
    table = _table(scope, [use[role][0] for use in uses], tokens)
    if table is None or (role == "weights" and not choices(scope, [table.source])):
        return  # experts that all tokens use, weighed
    ids = unweighted_dropped(
        all_experts(tokens, experts), lambda emit: table.open(tokens, experts, emit), experts
    )
    weighing = evidence.values("weights", "mix")
    all_weights: Iterable[Value | None] = (None,)
    if weighing:
        all_weights = dense_weights(scope, weighing, evidence)
    for weights in all_weights if role == "order" else (table.source,):
        cut = (table.source,) if weights in (None, table.source) else (table.source, weights)
        feeds = {value: sparse_feed(scope.ranges, value) for value in cut}
        recipe = None if weights is None else partial(as_rows, weights, tokens, experts)
        yield OpenExperts(ids, recipe, cut, feeds)


def as_rows(weights: Value, tokens: Dim, experts: int, emit: RegionEmitter) -> Value:
    """Weights of all experts, [.., E] or [E, T], as [T, E]."""
    value = emit.old(weights)
    if value.shape[-1] != experts:
        value = emit.permute(value, (1, 0))
    return emit.reshape(value, (tokens, experts))


def _among(op: Op) -> Dim:
    """How many elements a choice chooses among."""
    return op.inputs[0].shape[cast(int, op.attrs.get("dim", -1))]
