"""Costs of the phases equal numbers counted by hand from the sizes of published models."""

from __future__ import annotations

from typing import Any

import pytest

from moec.errors import UsageError
from moec.plan.inputs.model import Layers, Model, read_model
from moec.plan.inputs.workload import Workload, activations, of_distribution
from moec.plan.network.cluster import read_cluster, with_nodes
from moec.plan.network.degrees import Degrees
from moec.plan.search.planner import Planner
from moec.plan.simulation.cost import LayerCost

FLOPS, BANDWIDTH = 0.7 * 989e12, 0.7 * 3.35e12
"""Of an H100: the share of bf16 FLOP/s and bytes/s that kernels are assumed to reach."""
DEVICES = 32


def cost(name: str, degrees: Degrees, **work: Any) -> LayerCost:
    """Of a layer with experts of a model on 4 nodes of 8 H100."""
    model = read_model(name)
    cluster = with_nodes(read_cluster("superpod-32"), DEVICES // 8)
    loads = of_distribution("uniform", [layer.experts for layer in model.each_layer])
    planner = Planner(model, cluster, Workload(**work), loads, "")
    return planner.layer_cost(len(loads) - 1, degrees)


def test_latent_attention() -> None:
    """DeepSeek-V3: 128 heads; keys of 128 + 64 and values of 128, or 512 + 64 and 512 values of the
    cache. Taken for heads of 192, decoding would cost 2.83 times less."""
    layer = read_model("deepseek-v3").layers[-1]
    assert layer.pair_flop(decode=False) == 2 * 128 * (192 + 128)
    assert layer.pair_flop(decode=True) == 2 * 128 * (576 + 512)
    assert layer.pair_flop(decode=True) / (4 * 128 * 192) == pytest.approx(2.83, abs=0.01)


@pytest.mark.parametrize("decode", [False, True])
def test_attention_with_heads_of_keys_and_values(decode: bool) -> None:
    """Mixtral: 32 heads of 128."""
    assert read_model("mixtral-8x7b").layers[0].pair_flop(decode) == 4 * 32 * 128


def test_a_step_of_decode_reads_weights_and_cache() -> None:
    """128 texts of 4096 tokens a device: 1 byte a weight, 2 bytes a number in the cache."""
    degrees = Degrees(1, 32, 1, 256, "deduplicated")
    texts = {"tokens": 128 * DEVICES, "sequences": 128 * DEVICES, "context": 4096}
    parts = cost("deepseek-v3", degrees, **texts).parts
    size = 187_105_280 + 128 * 4096 * (512 + 64) * 2
    assert parts["attention"] == pytest.approx(size / BANDWIDTH)
    assert parts["attention"] > 128 * (2 * 187_105_280 + 4096 * 278_528) / FLOPS
    expert = 3 * 7168 * 2048
    read = 8 * (1 - (1 - 8 / 256) ** (128 * DEVICES)) * expert
    rows = 128 * 8 * 2 * (2 * 7168 + 2048)
    assert parts["experts"] == pytest.approx((read + rows) / BANDWIDTH)


def test_a_step_of_prefill_is_bound_by_products() -> None:
    """One prompt of 4096 tokens a device, each of which attends to 2048.5 on average."""
    degrees = Degrees(1, 32, 1, 256, "deduplicated")
    prompts = {"tokens": 4096 * DEVICES, "sequences": DEVICES, "context": 4096}
    parts = cost("deepseek-v3", degrees, **prompts, phase="prefill").parts
    flop = 4096 * (2 * 187_105_280 + 2048.5 * 81_920)
    assert parts["attention"] == pytest.approx(flop / FLOPS)
    assert parts["experts"] == pytest.approx(4096 * 8 * 2 * 3 * 7168 * 2048 / FLOPS)
    longer = cost("deepseek-v3", degrees, **prompts | {"context": 8192}, phase="prefill").parts
    more = (longer["attention"] - parts["attention"]) * FLOPS
    assert more == pytest.approx(4096 * 2048 * 81_920)


def test_two_micro_batches() -> None:
    """Each reads all weights and half of the cache; the shorter of products and exchanges is
    hidden. Gradients are summed once."""
    degrees = Degrees(1, 32, 1, 256, "deduplicated")
    texts = {"tokens": 128 * DEVICES, "sequences": 128 * DEVICES, "context": 4096}
    both = cost("deepseek-v3", degrees, **texts, overlap=True)
    half = cost("deepseek-v3", degrees, **texts | {"tokens": 64 * DEVICES})
    size = 2 * 187_105_280 + 128 * 4096 * (512 + 64) * 2
    assert both.parts["attention"] == pytest.approx(size / BANDWIDTH)
    assert both.parts["experts"] == pytest.approx(2 * half.parts["experts"])
    ways = ("exchange out", "exchange back")
    moved = sum(both.parts[way] for way in ways)
    assert moved == pytest.approx(2 * sum(half.parts[way] for way in ways))
    assert both.seconds == pytest.approx(max(moved, sum(both.parts.values()) - moved))
    assert both.memory == cost("deepseek-v3", degrees, **texts).memory
    work = {"tokens": 4096 * DEVICES, "sequences": 0, "context": 4096, "phase": "training"}
    one, two = (cost("mixtral-8x7b", Degrees(1, 8, 1, 8), **work, overlap=o) for o in (0, 1))
    assert one.parts["gradients"] == two.parts["gradients"] > 0


def test_numbers_that_a_backward_pass_needs() -> None:
    """Korthikanti et al.: 34 bytes per token and width of GPT, of which 2 are masks of dropout;
    with recomputed scores."""
    model = Model(name="gpt", width=64, weights="bf16", layers=(Layers(),))
    sizes = {"heads": 4, "head_width": 16, "kv_heads": 4, "kv_values": 128}
    layer = Layers(**sizes, dense_hidden=256, matrices=2)
    assert activations(model, layer)[0] * 2 == (34 - 2) * 64
    # Mixtral: queries and sums of 32 heads of 128, keys and values of 8; an expert's input, output,
    # and gate, up and their product.
    mixtral = read_model("mixtral-8x7b")
    of_token, of_row = activations(mixtral, mixtral.layers[0])
    assert of_token == 4 * 4096 + 2 * 32 * 128 + 2 * 8 * 128
    assert of_row == 2 * 4096 + 3 * 14336


def test_training_holds_activations_but_no_cache() -> None:
    """Mixtral, 4096 tokens a device, 8 ranks of one expert each: 2 bytes a number, and 16 bytes a
    parameter."""
    degrees = Degrees(1, 8, 1, 8, "flat")
    work = {"tokens": 4096 * DEVICES, "context": 4096, "phase": "training"}
    memory = cost("mixtral-8x7b", degrees, **work, sequences=DEVICES).memory
    parameters = 41_943_040 + 4096 * 8 + 3 * 4096 * 14336
    numbers = 4096 * (4 * 4096 + 2 * 4096 + 2048) + 4096 * 2 * (2 * 4096 + 3 * 14336)
    assert memory == pytest.approx(16 * parameters + 2 * numbers)
    sliced = cost("mixtral-8x7b", Degrees(1, 8, 2, 8, "coordinated"), **work, sequences=0).memory
    more = 4096 * 2 * 2 * 4096 * 2
    assert memory - sliced == pytest.approx(16 * 3 * 4096 * 14336 / 2 - more)


def test_training_that_does_not_fit_for_its_activations() -> None:
    """Mixtral fits 32 H100 with 1024 tokens each, and not with 65,536."""
    model = read_model("mixtral-8x7b")
    cluster = with_nodes(read_cluster("superpod-32"), DEVICES // 8)
    loads = of_distribution("uniform", [8] * 32)

    def plan(tokens: int) -> None:
        work = Workload(tokens=tokens * DEVICES, sequences=0, context=4096, phase="training")
        Planner(model, cluster, work, loads, "", (0.0,)).best()

    plan(1024)
    with pytest.raises(UsageError, match=r"for weights and activations, .* fewer tokens"):
        plan(65_536)
