"""MoE++: both modes are recognised with all kinds of experts, no row is dispatched to an expert
without a network, and results equal eager's."""

from __future__ import annotations

import functools

import pytest
import torch

import moec
from docs.systems import Figure, Source
from moec import CompiledModel
from tests.systems.records import Keep, load, record_of

example = load("06_moe_plus_plus")
SOURCE = Source(
    number=6,
    title="MoE++",
    paper="2410.07348",
    example="06_moe_plus_plus",
    process="autoregressive",
    modalities=("text",),
    adds="Experts without a network are recognised by their arithmetic, gating residuals and all; "
    "their rows are never dispatched, and are added where rows are combined.",
)
# Sums of at most a few hundred float32 terms in another order, through two layers.
TOLERANCE = 1e-5


@functools.cache
def compiled(published_code: bool) -> tuple[torch.nn.Module, CompiledModel]:
    torch.manual_seed(0)
    model, inputs = example.small(published_code)
    return model, moec.compile(model, inputs, kv_cache=False, verify=False)


@pytest.mark.parametrize("published_code", [False, True], ids=["paper", "code"])
def test_recognised_and_equal_to_eager(published_code: bool) -> None:
    model, ours = compiled(published_code)
    config = example.SMALL
    kinds = f"{config.constants} constant, 1 copy, 1 zero"
    assert [(b.experts, b.top_k, b.zero) for b in ours.blocks] == [
        (config.networks, 2, kinds)
    ] * config.layers
    for shape in ((1, 1), (3, 50)):
        ids = torch.randint(config.vocabulary, shape)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), model(ids), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("published_code", [False, True], ids=["paper", "code"])
def test_only_rows_of_networks_are_dispatched(published_code: bool) -> None:
    """The buffers of rows are sorted by networks alone, and the others are an epilogue."""
    _, ours = compiled(published_code)
    ops = ours.pass_results[-1].program.graph.ops
    sorts = [op.attrs["num_experts"] for op in ops if op.name == "moe.sort"]
    assert sorts == [example.SMALL.networks] * example.SMALL.layers
    epilogues = [op for op in ops if op.name == "moe.zero_experts"]
    assert len(epilogues) == example.SMALL.layers


@pytest.mark.parametrize("name", example.PUBLISHED)
def test_published_sizes(name: str) -> None:
    """The paper gives one digit for each model, which is its only figure: those of 0.6B, 1B and 2B
    round to it, and that of 7B, 7.7B here, is cut to it."""
    total = example.published(name)[0] / 1e9
    digit = example.PUBLISHED[name][1].removesuffix("B")
    assert f"{total:.1g}" == digit or str(int(total)) == digit == "7"


def test_sizes_are_those_of_the_released_model() -> None:
    """config.json of huggingface.co/Chat-UniVi/MoE-Plus-Plus-7B: its embeddings are not tied, and
    20 experts include two constants, a copy and a zero. All of its weights, matrix by matrix, are
    7.68 billion numbers."""
    config, _ = example.PUBLISHED["7B/(16+4)"]
    released = {"layers": 24, "width": 1536, "hidden": 4096, "heads": 16, "vocabulary": 65536}
    assert {name: getattr(config, name) for name in released} == released
    assert (config.experts, config.constants) == (20, 2)
    d, h, e = config.width, config.hidden, config.experts
    layer = (
        4 * d * d + 16 * 3 * d * h + 2 * 3 * d + e * d + 2 * d
    )  # attention, experts, gate, norms
    count = 2 * config.vocabulary * d + config.layers * (layer + e * e) + d - e * e
    assert example.published("7B/(16+4)")[0] == count == 7_676_619_248


def test_record(keep: Keep) -> None:
    figures = []
    for name, (_, paper) in example.PUBLISHED.items():
        total, active = example.published(name)
        ours = f"{total / 1e9:.3f}B, {active / 1e9:.3f}B active at most"
        digit = "cut" if name.startswith("7B") else "rounded"
        published = f"{paper}, {digit} to one digit"
        figures.append(Figure(f"parameters of {name}", ours, published, "a name of one digit"))
    keep(record_of(compiled(False)[1], SOURCE, f"{TOLERANCE:g}", figures))
