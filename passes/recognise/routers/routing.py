"""Which experts a block's rows belong to, and with which weights: hypotheses for the proof.

A region holds masks, sort orders and weights in some form; all are computed from ids [T, k] and
weights [T, k]. Dense weights [T, E] are gathered at the ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from moec.dtypes import FLOATS
from moec.errors import NoMatch
from moec.ir.graph import Value
from moec.ir.sizes.dims import product
from moec.passes.proof.input_generators import Feed
from moec.passes.recognise.reading.block import RecognisedCapacity
from moec.passes.recognise.reading.layout import divide
from moec.passes.recognise.region import Recipe, Scope, choices
from moec.passes.recognise.routers.evidence import Evidence
from moec.passes.recognise.routers.expert_ids import Chosen, are_of_rows, chosen, masks
from moec.passes.recognise.routers.region_boundary import capacities, counts_slots, cuts
from moec.passes.recognise.routers.routing_weights import (
    conditions,
    unfulfilled_dropped,
    unweighted_dropped,
    weightings,
)


class Unlike(NoMatch):
    """The region has no resemblance to a block: not worth a report."""


@dataclass(frozen=True)
class Choice:
    """A hypothesis: recipes for ids and weights, and where the region begins."""

    experts: Recipe
    weights: Recipe | None
    top_k: int
    cut: tuple[Value, ...]
    feeds: Mapping[Value, Feed] = field(default_factory=dict)
    capacity: RecognisedCapacity | None = None


def hypotheses(scope: Scope, evidence: Evidence) -> Iterator[Choice]:
    """Raises NoMatch if no op in the region chooses experts."""
    everything = evidence.values("ids", "order", "ends", "dispatch", "weights", "mask", "mix")
    candidates = [
        *hypotheses_of_ids(scope, evidence, everything),
        *(Chosen.mask(value, evidence) for value in masks(scope, evidence, everything)),
    ]
    if not candidates and not everything:
        raise Unlike(f"no op weights or chooses among {evidence.experts} results")
    if not candidates:
        raise NoMatch(_without_choice(scope, evidence, everything))
    for ids in candidates[:6]:
        slots = divide(product((ids.per_row, evidence.rows_in)), evidence.rows_out)
        if not isinstance(slots, int):
            continue
        for base, weights in weightings(scope, evidence, ids, slots):
            boundaries = list(cuts(scope, evidence, ids, base))
            inputs = {v for cut, _ in boundaries for v in cut if v in scope.graph.inputs}
            masked = bool(inputs.difference(evidence.reads))
            for experts, capacity in drops(scope, evidence, ids, weights, masked):
                for cut, feeds in boundaries:
                    yield Choice(experts, weights, slots, cut, feeds, capacity)


def hypotheses_of_ids(
    scope: Scope, evidence: Evidence, everything: Sequence[Value]
) -> Iterator[Chosen]:
    """Ids of groups of rows come before ids of single rows: their shapes say more."""
    for parts in chosen(scope, evidence, everything):
        groups = Chosen.of_groups(parts[0], scope, evidence) if len(parts) == 1 else None
        if groups is not None:
            yield groups
        if are_of_rows(parts, evidence.rows_in):
            yield Chosen.of(parts, scope, evidence)


def drops(
    scope: Scope, evidence: Evidence, ids: Chosen, weights: Recipe | None, masked: bool
) -> Iterator[tuple[Recipe, RecognisedCapacity | None]]:
    """Which choices an expert keeps: at most the capacity; those with a nonzero weight, if
    positions are counted in another way (per text, or in random order) or the routing is `masked`
    by an input (padding); all; those whose weight fulfils a condition."""
    for capacity in capacities(scope, evidence, ids.per_row):
        yield ids.recipe, capacity
    if weights is not None and (masked or counts_slots(scope, evidence)):
        yield unweighted_dropped(ids.recipe, weights, evidence.experts), None
    yield ids.recipe, None
    if weights is not None:
        for condition in conditions(scope, evidence):
            yield unfulfilled_dropped(ids.recipe, weights, condition, evidence.experts), None


def _without_choice(scope: Scope, evidence: Evidence, everything: Sequence[Value]) -> str:
    """The reason why no op chooses experts for each token."""
    for op in reversed(choices(scope, everything)):
        scores = op.inputs[0]
        if scores.dtype not in FLOATS or not scores.shape:
            continue
        if scores.shape[-1] == evidence.experts:
            return (
                f"{op.name} makes one choice for each of {product(scores.shape[:-1])}, not for "
                "each token"
            )
        if evidence.experts in scores.shape:
            return (
                f"experts choose their tokens: {op.name} chooses among {scores.shape[-1]} of them"
            )
    return f"every token uses all {evidence.experts} experts: no op chooses among them"
