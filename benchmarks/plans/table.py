"""Plans of four models on three clusters, replayed on skewed routing, against other plans.

    python -m benchmarks.plans.table
    python -m benchmarks.plans.table --topics 8    # tokens of one topic share experts

Routing is log-normal with sigma 1 (assumed). With topics, each expert belongs to one of them, and
nine tenths of a token's choices are of its topic. The plan is made from one half of the drawn
tokens, and the other half is replayed. `uniform`: the best plan with the same degrees, form and
share of copies in all layers, placed for the same half. `EPLB`: its degrees with EPLB's placement.
`even`: a plan for even routing, replayed. `bound`: the predicted time of that plan if routing were
even, less than which no placement of experts by load can take. Times are predicted by the
simulator from data-sheet and assumed numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from benchmarks.plans.replay import simulate
from moec.errors import UsageError
from moec.plan.inputs.files import preset_names
from moec.plan.inputs.model import Model, read_model
from moec.plan.inputs.workload import Workload, normalised, of_distribution
from moec.plan.network.cluster import Cluster, read_cluster
from moec.plan.placement.eplb import rebalance
from moec.plan.plan import Plan
from moec.plan.search.planner import Planner, best_uniform
from moec.plan.simulation.simulate import Ids, drawn, of_trace
from moec.runtime.call.routing_trace import RoutingTrace, of_ids

CLUSTERS = ("cpu-8-nodes", "superpod-32", "superpod-128")
TOKENS = 50_000
WITHIN = 0.9
"""The share of a token's choices that are of its topic."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--topics", type=int, default=1)
    parser.add_argument("--models", nargs="*", default=preset_names("models"))
    parser.add_argument("--clusters", nargs="*", default=CLUSTERS)
    arguments = parser.parse_args()
    print("| model | cluster | plan | uniform | EPLB + uniform | even | bound | CPU s to plan |")
    print("|---|---|---|---|---|---|---|---|")
    for model in arguments.models:
        for cluster in arguments.clusters:
            row(read_model(model), read_cluster(cluster), cluster, arguments.topics)


def trace_of(model: Model, tokens: int, topics: int) -> RoutingTrace:
    """Tokens of each topic in random order; a token has one topic in all layers."""
    sparse = [layer for layer in model.each_layer if layer.experts]
    experts = [layer.experts for layer in sparse]
    loads = of_distribution("lognormal:1", experts)
    generator = np.random.default_rng(0)
    groups = [generator.permutation(np.arange(count) % topics) for count in experts]
    parts: list[list[Ids]] = []
    for topic in range(topics):
        shares = [_within(load, of == topic) for load, of in zip(loads, groups, strict=True)]
        parts.append(list(drawn(shares, [layer.k for layer in sparse], tokens // topics, topic)))
    order = generator.permutation(tokens // topics * topics)
    layers = [np.concatenate(part)[order] for part in zip(*parts, strict=True)]
    return of_ids(np.stack(_equally_wide(layers), axis=1), np.array(experts))


def _within(load: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The load with `WITHIN` of it on the chosen experts."""
    if chosen.all():
        return load
    inside = normalised(load * chosen) * WITHIN
    return inside + normalised(load * ~chosen) * (1 - WITHIN)


def _equally_wide(layers: Sequence[Ids]) -> list[Ids]:
    width = max(ids.shape[1] for ids in layers)
    return [np.pad(i, ((0, 0), (0, width - i.shape[1])), constant_values=-1) for i in layers]


def row(model: Model, cluster: Cluster, name: str, topics: int) -> None:
    work = Workload(
        tokens=128 * cluster.devices,
        sequences=8 * cluster.devices,
        context=2048,
    )
    first, second = trace_of(model, 2 * max(TOKENS, work.tokens), topics).halves()
    counts = iter(first.counts())
    experts = [layer.experts for layer in model.each_layer]
    loads = tuple(normalised(next(counts).astype(float)) if e else np.empty(0) for e in experts)
    start = time.process_time()
    planner = Planner(model, cluster, work, loads, "first half of a drawn trace", trace=first)
    try:
        plan = planner.best()
    except UsageError as error:
        print(f"| {model.name} | {name} | {error} | | | | | |")
        return
    seconds = time.process_time() - start
    uniform = best_uniform(planner)
    even = Planner(model, cluster, work, of_distribution("uniform", experts), "").best()
    plans = (plan, uniform, with_eplb(uniform, loads), even)
    times = [simulate(p, planner.cost, of_trace(second)).seconds for p in plans]
    cells = " | ".join(f"{s * 1e3:.2f} ms" for s in (*times, even.seconds))
    print(f"| {model.name} | {name} | {cells} | {seconds:.1f} |", flush=True)


def with_eplb(plan: Plan, loads: Sequence[np.ndarray]) -> Plan:
    """The degrees of a plan with the placement of EPLB for loads [E] of each layer. It needs equal
    numbers of slots on all ranks: the greatest number of the plan's ranks."""
    layers = []
    for layer in plan.layers:
        if layer.experts:
            each = max(map(len, layer.slots))
            row = loads[layer.layer][None, :]
            table = rebalance(row, each * layer.ranks, 1, 1, layer.ranks)[0]
            slots = tuple(map(tuple, table.reshape(layer.ranks, each).tolist()))
            layer = replace(layer, slots=slots, sends=None)
        layers.append(layer)
    return replace(plan, layers=tuple(layers))


if __name__ == "__main__":
    main()
