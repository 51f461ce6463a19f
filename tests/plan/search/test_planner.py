"""Plans: within memory, never worse than uniform degrees; pyramids get separate degrees."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from benchmarks.plans.replay import simulate
from moec.errors import UsageError
from moec.plan.inputs.model import Layers, Model, read_model
from moec.plan.inputs.workload import Workload, of_distribution
from moec.plan.network.cluster import read_cluster, with_nodes
from moec.plan.network.degrees import Degrees
from moec.plan.plan import LayerPlan
from moec.plan.search.planner import Planner, best_uniform
from moec.plan.simulation.simulate import drawn, traffic


def planner(
    model: Model, devices: int, routing: str = "lognormal:1", sequences: int = 8
) -> Planner:
    cluster = with_nodes(read_cluster("superpod-32"), devices // 8)
    work = Workload(tokens=128 * devices, sequences=sequences * devices, context=1024)
    loads = of_distribution(routing, [layer.experts for layer in model.each_layer])
    return Planner(model, cluster, work, loads, routing)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b"])
def test_never_behind_uniform_degrees(name: str) -> None:
    p = planner(read_model(name), 16)
    best, uniform = p.best(), best_uniform(p)
    assert best.seconds <= uniform.seconds * (1 + 1e-9)
    assert best.memory <= best.memory_limit
    assert sum(layer.total for layer in best.layers) <= best.seconds * (1 + 1e-9)


def test_a_skewed_trace_is_planned_better_than_even_routing() -> None:
    model = read_model("mixtral-8x7b")
    p, even = planner(model, 16), planner(model, 16, "uniform")
    ids = list(drawn(p.loads, [2] * 32, 20_000))
    ours, other = (simulate(plan, p.cost, iter(ids)).seconds for plan in (p.best(), even.best()))
    assert ours < other


def test_a_pyramid_gets_degrees_of_its_own() -> None:
    """DeepSpeed-MoE's PR-MoE on 128 devices: EP 32, 64 and 128 with 4, 2 and 1 data copies, so that
    every device holds one expert of each layer, where memory leaves no choice."""
    sizes = {"attention": 4 * 1024**2, "heads": 16, "k": 1, "hidden": 65536, "matrices": 2}
    layers = tuple(Layers(experts=e, **sizes) for e in (32, 64, 128))
    model = Model(name="pyramid", width=16384, weights="f32", layers=layers)
    p = planner(model, 128, "uniform", sequences=0)
    plan = p.best()
    each = [(layer.ranks * layer.slices, layer.copies) for layer in plan.layers]
    assert all(len(slots) == 1 for layer in plan.layers for slots in layer.slots)
    assert [ranks * copies for ranks, copies in each] == [128] * 3
    assert len({layer.ranks for layer in plan.layers}) == 3


def test_eight_experts_on_two_nodes_are_reached_once_a_node() -> None:
    """Where each device has room for four experts of 64, and a step has many tokens."""
    layer = Layers(attention=4 * 1024**2, heads=16, experts=64, k=8, hidden=65536, matrices=2)
    model = Model(name="wide", width=16384, weights="f32", layers=(layer,))
    loads = of_distribution("uniform", [64])
    work = Workload(tokens=2**13, sequences=0, context=0)
    cluster = with_nodes(read_cluster("superpod-32"), 2)
    p = Planner(model, cluster, work, loads, "")
    plan = p.best()
    assert plan.layers[0].form == "deduplicated"
    (ids,) = drawn(loads, [8], 5_000)
    counts = traffic(ids, plan.layers[0], 16, 8)
    # 0.99 of 8 choices on the other node, where each of the other forms sends 4 rows.
    assert counts.sent_across.sum() == pytest.approx(0.99 * len(ids), rel=0.02)
    rail = msgspec.structs.replace(plan.layers[0], form="rail")
    assert traffic(ids, rail, 16, 8).sent_across.sum() == pytest.approx(4 * len(ids), rel=0.02)


@pytest.mark.parametrize(("nodes", "ranks"), [(40, 320), (18, 144)])
def test_decoding_of_deepseek_v3_with_few_tokens(nodes: int, ranks: int) -> None:
    """256 tokens for each expert, as DeepSeek-V3 decodes on 320 GPUs (arXiv 2412.19437, section
    3.4.2): reading experts costs more than an exchange with all ranks."""
    plan = deepseek(nodes, tokens=32, context=4989, phase="decode", sequences=32).best()
    degrees = {(layer.ranks, layer.form) for layer in plan.layers if layer.experts}
    assert degrees == {(ranks, "flat")}


@pytest.mark.parametrize("overlap", [False, True])
def test_prompts_of_deepseek_v3(overlap: bool) -> None:
    """EP 32 on 32 GPUs, as DeepSeek-V3 has it (section 3.4.1). Layers with fewer ranks are as many
    as the rest of the memory holds."""
    p = deepseek(4, tokens=4096, context=4096, phase="prefill", sequences=1, overlap=overlap)
    plan = p.best()
    layers = [layer for layer in plan.layers if layer.experts]
    wide = [layer for layer in layers if (layer.ranks, layer.form) == (32, "deduplicated")]
    assert wide
    assert all(layer.ranks <= 8 for layer in layers if layer not in wide)
    assert plan.memory > 0.98 * plan.memory_limit
    two_nodes = p.layer_cost(10, Degrees(1, 16, 1, 256, "deduplicated"))
    assert two_nodes.seconds == pytest.approx(p.layer_cost(10, degrees_of(wide[0])).seconds)


def deepseek(nodes: int, tokens: int, sequences: int, **work: Any) -> Planner:
    """Of DeepSeek-V3 in fp8 on nodes of 8 H800, with so many tokens and sequences a device."""
    cluster = with_nodes(read_cluster("h800-40"), nodes)
    numbers = {"tokens": tokens * cluster.devices, "sequences": sequences * cluster.devices}
    model = read_model("deepseek-v3")
    loads = of_distribution("uniform", [layer.experts for layer in model.each_layer])
    workload = Workload(**numbers, compute="fp8", send="fp8", **work)
    return Planner(model, cluster, workload, loads, "")


def degrees_of(layer: LayerPlan) -> Degrees:
    slots = sum(map(len, layer.slots))
    return Degrees(layer.attention, layer.ranks, layer.slices, slots, layer.form)


def test_a_model_that_does_not_fit() -> None:
    with pytest.raises(UsageError, match=r"does not fit .* resized to 1 nodes: at least"):
        planner(read_model("deepseek-v3"), 8).best()


def test_routing_of_other_experts() -> None:
    model = read_model("mixtral-8x7b")
    work = Workload(tokens=8, sequences=0, context=0)
    with pytest.raises(UsageError, match="layer 0 of Mixtral-8x7B has 8 experts, the"):
        Planner(model, read_cluster("h100-8"), work, tuple([np.ones(4)] * 32), "")


def test_training_needs_more_of_all() -> None:
    layer = Layers(attention=4 * 512**2, heads=8, head_width=64, experts=8, k=2, hidden=1024)
    model = Model(name="m", width=512, weights="bf16", layers=(layer,))
    loads = of_distribution("uniform", [8])
    cluster = with_nodes(read_cluster("superpod-32"), 2)
    sizes = {"tokens": 2**16, "sequences": 0, "context": 0}
    works = Workload(**sizes, phase="prefill"), Workload(**sizes, phase="training")
    serve, train = (Planner(model, cluster, work, loads, "").best() for work in works)
    assert train.seconds > 2 * serve.seconds
    assert "gradients" in train.layers[0].seconds
