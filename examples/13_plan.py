"""A plan for many devices: busy experts, the benefit of a trace, and the cost of each choice.

It needs only sizes: no weights and no devices. All times are predictions from the cluster's
numbers.

    python examples/13_plan.py
"""

from __future__ import annotations

from moec.plan.inputs.model import read_model
from moec.plan.inputs.workload import Workload, of_distribution
from moec.plan.network.cluster import read_cluster
from moec.plan.plan import show
from moec.plan.report import text
from moec.plan.search.planner import Planner, best_uniform

ROUTING = "lognormal:1"


def main() -> None:
    model, cluster = read_model("qwen3-30b-a3b"), read_cluster("h100-8")
    work = Workload(
        tokens=128 * cluster.devices, sequences=128 * cluster.devices, context=2048, phase="decode"
    )
    experts = [layer.experts for layer in model.each_layer]
    loads = of_distribution(ROUTING, experts)
    planner = Planner(model, cluster, work, loads, f"{ROUTING} (assumed)", (0.0, 0.125))
    plan = planner.best()
    print(show(plan))
    layer = plan.layers[0]
    print(text.explain(layer, planner.candidates[0], plan.memory_limit))
    print(text.compare(plan, best_uniform(planner), ("this plan", "uniform degrees")))


if __name__ == "__main__":
    main()
