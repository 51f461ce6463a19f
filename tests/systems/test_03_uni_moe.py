"""Uni-MoE: experts that are a frozen FFN with adapters are recognised once the adapters are folded
into the weights, with the same results as unfolded; experts of a modality are placed on its ranks;
Table 1's parameter counts."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn

import moec
from docs.systems import COMPARABLE, Figure, Source
from moec import CompiledModel
from moec.plan.placement.bound_experts import place_bound
from tests.systems.records import Keep, load, record_of

example = load("03_uni_moe")
SOURCE = Source(
    number=3,
    title="Uni-MoE",
    paper="2405.11273",
    example="03_uni_moe",
    process="autoregressive",
    modalities=("text", "image", "video", "audio"),
    adds="fold-lora makes one weight of each frozen layer and its adapter, so that experts run as "
    "grouped products without the adapters' two extra ones. "
    "`moec.plan.placement.bound_experts` places the experts of a modality on ranks of their own.",
)
TOLERANCE = 2e-5  # float32; folding an adapter rounds once more than running it


@functools.cache
def compiled() -> tuple[nn.Module, CompiledModel]:
    torch.manual_seed(0)
    model, inputs = example.small()
    return model, moec.compile(model, inputs, passes="+fold-lora", kv_cache=False, verify=False)


def test_experts_with_adapters_are_recognised() -> None:
    config = example.SMALL
    _, ours = compiled()
    assert [(b.experts, b.top_k, b.router, b.activation) for b in ours.blocks] == [
        (config.experts, 2, "top-2, softmax", "swiglu")
    ] * config.layers


def test_adapters_are_folded_into_the_experts() -> None:
    """Three a expert; no product of the rank's width is left."""
    config = example.SMALL
    _, ours = compiled()
    (step,) = [step for step in ours.pass_results if step.name == "fold-lora"]
    assert step.rewrites == 3 * config.experts * config.layers
    linears = [op for op in step.program.graph.ops if op.name == "aten.linear.default"]
    assert all(op.outputs[0].shape[-1] != config.rank for op in linears)


def test_merged_equals_unmerged_for_images_and_videos() -> None:
    model, ours = compiled()
    for sizes in ((1, 1, 1), (2, 7, 8)):
        inputs = example.example_inputs(example.SMALL, *sizes)
        with torch.no_grad():
            torch.testing.assert_close(ours(*inputs), model(*inputs), rtol=1e-4, atol=TOLERANCE)


def test_experts_are_bound_to_the_ranks_of_their_modality() -> None:
    """An expert was trained for each modality; images and videos are of one."""
    modalities = {"text": [0], "vision": [1, 2], "audio": [3]}
    assert sum(map(len, modalities.values())) == example.Config().experts
    bound = place_bound(np.array([1.0, 4.0, 2.0, 1.0]), modalities, 4)
    for name, ranks in bound.ranks.items():
        experts = [expert for rank in ranks for expert in bound.placement.slots[rank]]
        assert sorted(experts) == modalities[name]
    assert len(bound.ranks["vision"]) == 2  # most of the load


@pytest.mark.parametrize("name", example.PUBLISHED)
def test_published_sizes(name: str) -> None:
    _, *paper = example.PUBLISHED[name]
    counts = [count / 1e9 for count in example.published(name)]
    assert counts == pytest.approx(paper, rel=0.01)


def test_record(keep: Keep) -> None:
    figures = []
    for name, (_, *paper) in example.PUBLISHED.items():
        ours = "{:.2f}B, {:.2f}B active".format(*(n / 1e9 for n in example.published(name)))
        published = "{}B, {}B active".format(*paper)
        figures.append(Figure(f"parameters of {name}", ours, published, COMPARABLE))
    keep(record_of(compiled()[1], SOURCE, f"{TOLERANCE:g}", figures))
