"""Replays DeepSeek-V3's MoE layers on 8 to 10,000 ranks, and measures how long that takes.

    python -m benchmarks.plans.scaling

Routing is log-normal with sigma 1 (assumed), 100 tokens per rank. EP is over at most 256 ranks,
flat within a node and deduplicated beyond. Nodes are those of superpod-32.
"""

from __future__ import annotations

import time

from benchmarks.plans.replay import simulate
from moec.plan.inputs.model import Layers, Model, read_model
from moec.plan.inputs.workload import Workload, of_distribution
from moec.plan.network.cluster import read_cluster, with_nodes
from moec.plan.network.degrees import Degrees
from moec.plan.search.planner import Planner
from moec.plan.simulation.simulate import drawn

LAYERS = 61
SIZES = ((8, 8), (64, 64), (256, 256), (1_024, 256), (4_096, 256), (10_000, 200))


def main() -> None:
    print(
        "| ranks | tokens | EP | step, exchange and experts | busiest/mean | replay, CPU seconds |"
    )
    print("|---|---|---|---|---|---|")
    source = read_model("deepseek-v3")
    layer = source.layers[-1]
    sizes = {name: getattr(layer, name) for name in layer.__struct_fields__ if name != "repeat"}
    group = Layers(**sizes, repeat=LAYERS)
    model = Model(
        name="DeepSeek-V3, MoE layers", width=source.width, weights="fp8", layers=(group,)
    )
    loads = of_distribution("lognormal:1", [256] * LAYERS)
    for devices, ranks in SIZES:
        cluster = with_nodes(read_cluster("superpod-32"), devices // 8)
        work = Workload(tokens=100 * devices, sequences=0, context=0)
        planner = Planner(model, cluster, work, loads, "lognormal:1", (0.0,))
        form = "flat" if ranks == 8 else "deduplicated"
        plan = planner.plan([Degrees(1, ranks, 1, 256, form)] * LAYERS, 0.0)  # type: ignore[arg-type]
        start = time.process_time()
        result = simulate(plan, planner.cost, drawn(loads, [8] * LAYERS, work.tokens))
        seconds = time.process_time() - start
        worst = max(one.imbalance for one in result.layers)
        print(
            f"| {devices:,} | {work.tokens:,} | {ranks} | {result.seconds * 1e3:.1f} ms | "
            f"{worst:.2f} | {seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
