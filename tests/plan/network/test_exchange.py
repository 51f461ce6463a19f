"""Hop counts and volumes equal those in the papers."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from benchmarks.plans.deepep import Figure, figures, fit
from moec.plan.inputs.files import Quantity
from moec.plan.inputs.model import Layers, read_model
from moec.plan.inputs.workload import Workload, of_distribution
from moec.plan.network.cluster import read_cluster
from moec.plan.network.degrees import Degrees
from moec.plan.network.exchange import (
    collective_seconds,
    coordinated,
    deduplicated,
    distinct_nodes,
    even_away,
    flat,
    hierarchical,
    rail_aligned,
    seconds,
)
from moec.plan.search.planner import Planner


@pytest.mark.parametrize(("ranks", "slices", "hops"), [(128, 1, 128), (128, 8, 16), (64, 4, 16)])
def test_coordinated_hops_are_those_of_deepspeed_moe(ranks: int, slices: int, hops: int) -> None:
    """Section 5.3: 128 C1 + C2 becomes 16 C1 + C2 for L = 8."""
    step = coordinated(ranks, 8, slices, 1.0) if slices > 1 else flat(ranks, 8, 1.0)
    assert step.published_hops == hops


@pytest.mark.parametrize(("ranks", "node"), [(128, 8), (64, 8), (256, 16), (8, 8), (8, 1)])
def test_two_stages_need_the_sum_of_their_hops_and_move_rows_twice(ranks: int, node: int) -> None:
    volume = float(ranks * node)
    one, two = flat(ranks, node, volume), hierarchical(ranks, node, volume)
    assert one.hops_inside + one.hops_across == ranks - 1
    assert (two.hops_inside, two.hops_across) == (node - 1, ranks // node - 1)
    assert one.bytes_inside + one.bytes_across == pytest.approx(volume * (ranks - 1) / ranks)
    assert two.bytes_inside == pytest.approx(volume * (node - 1) / node)
    assert two.bytes_across == pytest.approx(volume * (1 - node / ranks))
    assert two.bytes_copied == 2 * volume


def test_rail_form_charges_the_busiest_rail() -> None:
    """SE-MoE's figure: 4 nodes of 8, inside first, then between equal local ranks."""
    level, skewed = rail_aligned(32, 8, 32.0), rail_aligned(32, 8, 32.0, busiest_rail=1.5)
    assert (level.hops_inside, level.hops_across) == (7, 3)
    assert (level.bytes_inside, level.bytes_across) == (28.0, 24.0)
    assert (skewed.bytes_inside, skewed.bytes_across) == (28.0, 36.0)


@pytest.mark.parametrize(("nodes", "mean"), [(2, 1.99), (4, 3.61), (8, 5.29), (16, 6.52)])
def test_distinct_nodes_of_a_token(nodes: int, mean: float) -> None:
    """E = 256, k = 8."""
    assert distinct_nodes(256, 8, nodes) == pytest.approx(mean, abs=0.02)


@pytest.mark.parametrize(("nodes", "mean"), [(2, 1.99), (4, 3.61), (8, 5.29), (16, 6.52)])
def test_a_token_crosses_once_to_each_node(nodes: int, mean: float) -> None:
    """E = 256, k = 8 on nodes of 8: each choice is a row of the other forms."""
    ranks, volume = 8 * nodes, 8.0
    away = even_away(Layers(experts=256, k=8), nodes)
    once, two = deduplicated(ranks, 8, volume, away), hierarchical(ranks, 8, volume)
    assert once.bytes_across == pytest.approx(mean * (nodes - 1) / nodes, abs=0.02)
    assert once.bytes_across < two.bytes_across
    assert (once.hops_inside, once.hops_across) == (two.hops_inside, two.hops_across)
    assert once.bytes_inside == two.bytes_inside


@pytest.mark.parametrize(("nodes", "mean"), [(2, 1.925), (4, 2.93), (8, 3.63), (16, 5.33)])
def test_a_token_of_four_groups_of_eight(nodes: int, mean: float) -> None:
    """DeepSeek-V3; means of 4000 drawn tokens."""
    layer = read_model("deepseek-v3").layers[-1]
    assert even_away(layer, nodes) * 8 * nodes / (nodes - 1) == pytest.approx(mean, rel=0.01)


def test_more_nodes_than_experts() -> None:
    assert distinct_nodes(4, 2, 8) == pytest.approx(8 * (1 - 3 / 6))


def test_two_stages_pay_for_small_messages_only() -> None:
    cluster = replace(read_cluster("superpod-32"), one_sided=None)

    def faster(volume: float) -> bool:
        two = seconds(hierarchical(256, 8, volume), cluster, 256)
        return two < seconds(flat(256, 8, volume), cluster, 256)

    assert faster(1e6)
    assert not faster(1e9)


def test_one_sided_messages_are_under_way_together() -> None:
    """A flat exchange of 320 ranks has one latency, and that of the slower level."""
    cluster = read_cluster("h800-40")
    inside, across = cluster.levels
    assert cluster.one_sided is not None
    kernel, volume = cluster.one_sided.value, 1e7
    once = kernel + across.latency.value
    far = volume * 312 / 320 / across.bandwidth.value
    assert seconds(flat(320, 8, volume), cluster, 320) == pytest.approx(once + far)
    both = inside.latency.value + across.latency.value
    step = deduplicated(320, 8, volume, 0.5)
    forwarded = 2 * (kernel + both) + volume / 2 / across.bandwidth.value
    assert seconds(step, cluster, 320) == pytest.approx(forwarded)
    rail = seconds(rail_aligned(320, 8, volume), cluster, 320)
    near = volume * 7 / 8 / inside.bandwidth.value
    copied = 2 * volume / cluster.device.copy_bandwidth
    sent = near + volume * 39 / 40 / across.bandwidth.value
    assert rail == pytest.approx(2 * (2 * kernel + both) + sent + copied)
    two_sided = replace(cluster, one_sided=None)
    serial = 7 * inside.latency.value + 312 * across.latency.value
    assert seconds(flat(320, 8, volume), two_sided, 320) == pytest.approx(serial + far)


FIGURES, OTHERS = figures()


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f"{f.kernel} {f.ranks} {f.way}")
def test_published_times_of_deepep(figure: Figure) -> None:
    """Three parameters for 20 times: the greatest error is 7.8 %."""
    assert abs(figure.error(read_cluster("h800-40"))) < 0.2


def test_parameters_are_those_of_least_error() -> None:
    cluster = read_cluster("h800-40")
    fitted = fit(cluster, FIGURES)
    for one, two in zip(cluster.levels, fitted.levels, strict=True):
        assert one.bandwidth.value == pytest.approx(two.bandwidth.value, rel=0.01)
    assert cluster.one_sided is not None
    assert fitted.one_sided is not None
    assert cluster.one_sided.value == pytest.approx(fitted.one_sided.value, rel=0.01)


def test_calls_and_sorted_rows_of_a_measured_cluster() -> None:
    """A stage has two collectives in one direction, and both stages of a node are on its link."""
    cluster, volume = replace(read_cluster("h100-8"), one_sided=None), 1e6
    (level,) = cluster.levels
    slow = replace(level, call=Quantity(1e-3, "measured"))
    device = replace(cluster.device, dispatch_bandwidth=Quantity(1e9, "measured"))
    measured = replace(cluster, levels=(slow,), device=device)
    one, two = flat(8, 8, volume), hierarchical(8, 2, volume)
    assert seconds(one, measured, 8) - seconds(one, cluster, 8) == pytest.approx(2e-3)
    sorting = 4 * volume * (1 / 1e9 - 1 / cluster.device.memory_bandwidth.value)
    added = seconds(two, measured, 8) - seconds(two, cluster, 8)
    assert added == pytest.approx(4e-3 + sorting)
    assert collective_seconds("all_gather", 0.0, 8, 8, measured) == pytest.approx(
        1e-3 + collective_seconds("all_gather", 0.0, 8, 8, cluster)
    )
    names = [name for name, _ in measured.quantities()]
    assert "bandwidth of dispatch, bytes/s" in names
    assert f"{level.name} call of a collective, s" in names


def test_routing_is_a_part_where_its_rate_is_measured() -> None:
    """512 tokens a rank, 2 experts each, rows of 4096 in bf16 to the experts and back."""
    cluster = read_cluster("h100-8")
    device = replace(cluster.device, dispatch_bandwidth=Quantity(1e9, "measured"))
    model = read_model("mixtral-8x7b")
    work = Workload(tokens=8 * 512, sequences=0, context=0, send="bf16", back="bf16")
    parts = [
        Planner(model, machine, work, of_distribution("uniform", [8] * 32), "uniform", (0.0,))
        .plan([Degrees(1, 8, 1, 8, "flat")] * 32, 0.0)
        .layers[0]
        .seconds
        for machine in (cluster, replace(cluster, device=device))
    ]
    assert "routing" not in parts[0]
    assert parts[1]["routing"] == pytest.approx(512 * 2 * 4096 * (2 + 2) / 1e9)
    assert parts[1]["experts"] == parts[0]["experts"]
