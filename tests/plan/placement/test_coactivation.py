"""Experts that tokens choose together are placed on one node, at no cost in balance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import UsageError
from moec.plan.placement.coactivation import SLACK, coactivation, place_together
from moec.plan.placement.placement import place, rank_loads
from moec.plan.plan import LayerPlan, Sends
from moec.plan.simulation.simulate import count_sends
from moec.runtime.call.routing_trace import RoutingTrace, of_ids


def planted(experts: int, groups: int, k: int, tokens: int, sigma: float) -> RoutingTrace:
    """Nine of ten tokens choose within one of `groups` random sets of experts, by log-normal
    popularity; the others choose among all."""
    generator = np.random.default_rng(0)
    group_of = generator.permutation(np.arange(experts) % groups)
    popularity = generator.lognormal(0, sigma, experts)
    ids = np.empty((tokens, k), np.int64)
    for token in range(tokens):
        everywhere = generator.random() < 0.1
        group = generator.integers(groups)
        pool = np.flatnonzero(everywhere | (group_of == group))
        shares = popularity[pool] / popularity[pool].sum()
        ids[token] = generator.choice(pool, k, replace=False, p=shares)
    return of_ids(ids[:, None], experts)


def sends(trace: RoutingTrace, ranks: int, slots: int, node: int) -> Sends:
    """After a placement by load and one by load and co-activation, which is no less balanced."""
    loads = trace.counts()[0].astype(float)
    by_load = place(loads, ranks, slots)
    meets = coactivation(trace, 0)
    together = place_together(by_load, loads, meets, node)
    assert together.busiest <= by_load.busiest * SLACK * (1 + 1e-9)
    layer = LayerPlan(
        layer=0, experts=len(loads), attention=1, ranks=ranks, slots=together.slots, seconds={}
    )
    return count_sends(trace.ids[:, 0], layer, by_load.slots, ranks, node)


@pytest.mark.parametrize(
    ("experts", "groups", "k", "ranks", "slots", "node", "sigma", "gain"),
    [
        (32, 4, 4, 8, 32, 2, 0.0, 0.3),
        (32, 4, 4, 8, 40, 2, 1.0, 0.25),
        (64, 8, 4, 16, 64, 4, 0.5, 0.35),
    ],
    ids=["even", "skewed, with copies", "more nodes"],
)
def test_a_planted_trace_needs_fewer_sends(
    experts: int, groups: int, k: int, ranks: int, slots: int, node: int, sigma: float, gain: float
) -> None:
    counts = sends(planted(experts, groups, k, 2000, sigma), ranks, slots, node)
    assert counts.nodes <= (1 - gain) * counts.nodes_by_load
    assert counts.ranks < counts.ranks_by_load


def test_one_node_gathers_on_ranks() -> None:
    counts = sends(planted(16, 4, 2, 2000, 0.0), ranks=4, slots=16, node=4)
    assert counts.nodes == counts.nodes_by_load == 0
    assert counts.ranks <= 0.85 * counts.ranks_by_load


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 6), st.integers(1, 3), st.data())
def test_any_placement(experts: int, ranks: int, more: int, node: int, data: st.DataObject) -> None:
    """The slots hold the same copies, none is on a rank twice, and the busiest rank is stated."""
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    slots = min(max(experts, ranks) + more, experts * ranks)
    loads = generator.lognormal(0, 1, experts)
    ids = generator.integers(-1, experts, (20, 1, 3))
    by_load = place(loads, ranks, slots)
    together = place_together(by_load, loads, coactivation(of_ids(ids, experts), 0), node)
    held = [sorted(e for rank in p.slots for e in rank) for p in (by_load, together)]
    assert held[0] == held[1]
    twice = [sum(len(r) - len(set(r)) for r in p.slots) for p in (by_load, together)]
    assert twice[1] <= twice[0]
    assert together.busiest == pytest.approx(rank_loads(loads, together.slots).max())
    assert together.busiest <= by_load.busiest * SLACK * (1 + 1e-9)


def test_experts_that_the_trace_does_not_know() -> None:
    meets = coactivation(of_ids(np.array([[[0, 1]], [[1, -1]]]), 2), 0, experts=3)
    assert meets.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    with pytest.raises(UsageError, match="co-activation of 3 experts, loads of 2"):
        place_together(place(np.ones(2), 2), np.ones(2), meets, 1)
