"""Plans of four models on three clusters, replayed on skewed routing, against two other plans.

    python benchmarks/plan_table.py

Routing is log-normal with sigma 1 (assumed). The plan is made from half of the drawn tokens; the
other half is replayed. `uniform`: the best plan with the same degrees in all layers; `EPLB`: the
same degrees with EPLB's placement. Times are predicted by the simulator from data-sheet and assumed
numbers.
"""

from __future__ import annotations

import time

import numpy as np

from moec.errors import UsageError
from moec.plan.cluster import Cluster, read_cluster
from moec.plan.files import preset_names
from moec.plan.model import Model, read_model
from moec.plan.planner import Planner
from moec.plan.popularity import normalised, of_distribution
from moec.plan.simulate import drawn, simulate
from moec.plan.workload import Workload

CLUSTERS = ("cpu-8-nodes", "superpod-32", "superpod-128")
TOKENS = 50_000


def main() -> None:
    print("| model | cluster | plan | uniform | EPLB + uniform | no trace | seconds to plan |")
    print("|---|---|---|---|---|---|---|")
    for model in preset_names("models"):
        for cluster in CLUSTERS:
            row(read_model(model), read_cluster(cluster), cluster)


def row(model: Model, cluster: Cluster, name: str) -> None:
    layers = model.each_layer
    true = of_distribution("lognormal:1", [layer.experts for layer in layers])
    k = [layer.k for layer in layers]
    ids = [i[:TOKENS] for i in drawn(true, k, 2 * TOKENS)]
    other = [i[TOKENS:] for i in drawn(true, k, 2 * TOKENS)]
    rows = iter(ids)
    loads = tuple(
        normalised(np.bincount(next(rows).ravel(), minlength=e).astype(float)) if e else np.empty(0)
        for e in (layer.experts for layer in layers)
    )
    work = Workload(
        tokens=128 * cluster.devices,
        sequences=8 * cluster.devices,
        context=2048,
    )
    start = time.perf_counter()
    planner = Planner(model, cluster, work, loads, "first half of a drawn trace")
    try:
        plan = planner.best()
    except UsageError as error:
        print(f"| {model.name} | {name} | {error} | | | | |")
        return
    seconds = time.perf_counter() - start
    uniform = planner.best_uniform()
    eplb = planner.with_eplb(uniform)
    equal = of_distribution("uniform", [layer.experts for layer in layers])
    even = Planner(model, cluster, work, equal, "")
    times = [
        simulate(p, planner.cost, iter(other)).seconds * 1e3
        for p in (plan, uniform, eplb, even.best())
    ]
    cells = " | ".join(f"{ms:.2f} ms" for ms in times)
    print(f"| {model.name} | {name} | {cells} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
