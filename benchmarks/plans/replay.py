"""Replays routed tokens on the ranks of a plan: the seconds of its layers by the cost model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moec.errors import UsageError
from moec.plan.network.degrees import Degrees
from moec.plan.plan import LayerPlan, Plan
from moec.plan.simulation.cost import CostModel
from moec.plan.simulation.simulate import Ids, Traffic, traffic


@dataclass(frozen=True)
class LayerResult:
    """`seconds` of the cost model for the busiest rank and link; `waits_for` is the slowest
    part."""

    layer: int
    seconds: float
    imbalance: float
    link_imbalance: float
    rows_across: int
    rows_deduplicated: int
    waits_for: str


@dataclass(frozen=True)
class SimulationResult:
    layers: tuple[LayerResult, ...]
    dense_seconds: float

    @property
    def seconds(self) -> float:
        return self.dense_seconds + sum(layer.seconds for layer in self.layers)


def simulate(plan: Plan, cost: CostModel, layers: Iterable[Ids]) -> SimulationResult:
    """Replay ids [T, K] of each MoE layer in turn; `cost` is of the same model and cluster.

    Raises UsageError where there are fewer arrays of ids than MoE layers.
    """
    source, results, dense = iter(layers), [], 0.0
    for layer in plan.layers:
        if not layer.experts:
            dense += layer.total
            continue
        ids = next(source, None)
        if ids is None:
            raise UsageError("the routing has fewer layers than the plan")
        results.append(_replay(layer, plan, cost, ids))
    reshard = sum(
        cost.reshard(one.attention, two.attention)
        for one, two in zip(plan.layers, plan.layers[1:], strict=False)
    )
    return SimulationResult(tuple(results), dense + reshard)


def _replay(layer: LayerPlan, plan: Plan, cost: CostModel, ids: Ids) -> LayerResult:
    counts = traffic(ids, layer, plan.devices, plan.node_size)
    slots = sum(map(len, layer.slots))
    degrees = Degrees(layer.attention, layer.ranks, layer.slices, slots, layer.form)
    away = counts.deduplicated / max(1, int(counts.rows.sum()))
    result = cost.with_load(layer.layer, degrees, counts.imbalance, link_imbalance(counts), away)
    slowest = max(result.parts, key=lambda part: result.parts[part])
    return LayerResult(
        layer.layer,
        result.seconds,
        counts.imbalance,
        link_imbalance(counts),
        int(counts.sent_across.sum()),
        counts.deduplicated,
        slowest,
    )


def link_imbalance(counts: Traffic) -> float:
    """The load of the busiest link over the mean: across nodes if rows leave it, else inside."""
    pairs = ((counts.sent_across, counts.got_across), (counts.sent_inside, counts.got_inside))
    for sent, received in pairs:
        mean = float(sent.mean())
        if mean > 0:
            return max(float(sent.max()), float(received.max())) / mean
    return 1.0
