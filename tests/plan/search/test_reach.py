"""A trace's nodes are in the cost of a deduplicated exchange, estimated and then counted."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from msgspec.structs import replace

from benchmarks.plans.replay import simulate
from moec.plan.inputs.files import Quantity
from moec.plan.inputs.model import Layers, Model
from moec.plan.inputs.workload import Workload, normalised
from moec.plan.network.cluster import read_cluster, with_nodes
from moec.plan.network.degrees import Degrees
from moec.plan.placement.placement import place
from moec.plan.plan import Plan
from moec.plan.search.planner import Planner, best_uniform
from moec.plan.search.reach import LayerReach
from moec.plan.simulation.simulate import drawn, of_trace
from moec.runtime.call.routing_trace import RoutingTrace, of_ids

LAYER = Layers(attention=4 * 1024**2, heads=16, experts=64, k=4, hidden=1024, matrices=2)


@cache
def halves() -> tuple[RoutingTrace, RoutingTrace]:
    """Tokens of eight topics, each of which has eight experts and nine tenths of the choices."""
    generator = np.random.default_rng(0)
    group_of = generator.permutation(np.arange(64) % 8)
    popularity = generator.lognormal(0, 0.5, 64)
    shares = [normalised(popularity * np.where(group_of == t, 9.0, 1 / 7)) for t in range(8)]
    ids = np.concatenate([next(drawn([share], [4], 4096, t)) for t, share in enumerate(shares)])
    return of_ids(generator.permutation(ids)[:, None], 64).halves()


def planner(trace: RoutingTrace | None) -> Planner:
    """64 experts on 4 nodes of 8 devices, which have room for few of them."""
    model = Model(name="m", width=8192, weights="f32", layers=(LAYER,))
    loads = (normalised(halves()[0].counts()[0].astype(float)),)
    work = Workload(tokens=2**14, sequences=0, context=0)
    cluster = with_nodes(read_cluster("superpod-32"), 4)
    sizes = {"memory": Quantity(3e8, "assumed"), "reserved": Quantity(0.0, "assumed")}
    cluster = replace(cluster, device=replace(cluster.device, **sizes))
    return Planner(model, cluster, work, loads, "", (0.0,), trace)


def replayed(plan: Plan, p: Planner) -> float:
    return simulate(plan, p.cost, of_trace(halves()[1])).seconds


def test_topics_are_planned_for_and_measured_on_the_other_half() -> None:
    with_trace, by_load = planner(halves()[0]), planner(None)
    ours, other = with_trace.best(), by_load.best()
    assert ours.layers[0].form == "deduplicated"
    assert replayed(ours, by_load) < 0.9 * replayed(other, by_load)
    assert ours.seconds == pytest.approx(replayed(ours, by_load), rel=0.05)
    assert best_uniform(with_trace).seconds == pytest.approx(ours.seconds)
    assert sum(layer.total for layer in ours.layers) == pytest.approx(ours.seconds)
    chosen = next(c for c in with_trace.candidates[0] if c.cost.seconds == ours.layers[0].total)
    assert chosen.degrees.form == "deduplicated"


def test_an_estimate_is_near_the_count() -> None:
    ids = np.ascontiguousarray(halves()[0].ids[:, 0])
    reach = LayerReach(ids, halves()[0].counts()[0].astype(float), 8)
    degrees = Degrees(1, 32, 1, 64, "deduplicated")
    estimate = reach.away(degrees)
    assert not reach.is_placed(degrees)
    placed = reach.placed(degrees, place(reach.loads, 32, 64))
    assert reach.away(degrees) == placed.away == placed.sends.nodes / 4
    assert estimate == pytest.approx(placed.away, rel=0.25)
    assert estimate < 0.7 * placed.sends.nodes_by_load / 4


def test_tokens_without_experts_are_no_rows() -> None:
    """A prompt's last layer has choices of its last token alone."""
    ids = np.ascontiguousarray(halves()[0].ids[:, 0])
    absent = np.full_like(ids, -1)
    loads = halves()[0].counts()[0].astype(float)
    degrees = Degrees(1, 32, 1, 64, "deduplicated")
    full, half = (LayerReach(i, loads, 8) for i in (ids, np.concatenate([ids, absent])))
    by_load = place(loads, 32, 64)
    for reach in (full, half):
        reach.placed(degrees, by_load)
    assert half.away(degrees) == pytest.approx(full.away(degrees), rel=0.1)


def test_other_forms_and_bound_experts_stay_where_loads_put_them() -> None:
    ids = np.ascontiguousarray(halves()[0].ids[:, 0])
    loads = halves()[0].counts()[0].astype(float)
    by_load = place(loads, 32, 64)
    flat = LayerReach(ids, loads, 8).placed(Degrees(1, 32, 1, 64), by_load)
    once = Degrees(1, 32, 1, 64, "deduplicated")
    bound = LayerReach(ids, loads, 8, fixed=True).placed(once, by_load)
    assert flat.placement is bound.placement is by_load
    assert flat.sends.nodes == flat.sends.nodes_by_load


def test_equal_shares_of_copies_in_all_layers() -> None:
    """Although the hot expert of one layer alone needs copies."""
    layer = Layers(attention=1024, heads=16, experts=8, k=2, hidden=4096)
    model = Model(name="m", width=1024, weights="bf16", layers=(layer, layer))
    hot = normalised(np.array([9.0, 1, 1, 1, 1, 1, 1, 1]))
    work = Workload(tokens=2**10, sequences=0, context=0)
    p = Planner(model, read_cluster("h100-8"), work, (hot, np.full(8, 1 / 8)), "", (0.0, 1.0))
    best, uniform = p.best(), best_uniform(p)
    first, second = uniform.layers
    assert sum(map(len, first.slots)) == sum(map(len, second.slots))
    assert (first.ranks, first.slices, first.form) == (second.ranks, second.slices, second.form)
    assert best.seconds <= uniform.seconds * (1 + 1e-9)
