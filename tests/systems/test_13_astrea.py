"""Astrea: four experts of different graphs and output shapes are one node, training parts are not
compiled, and results equal eager's."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import moec
from docs.systems import Figure, Source
from moec import CompiledModel
from tests.systems.records import Keep, load, record_of

example = load("13_astrea")
SOURCE = Source(
    number=13,
    title="Astrea",
    paper="2503.09445",
    example="13_astrea",
    process="encoder",
    modalities=("image", "text"),
    adds="Detection, segmentation, classification and captioning have different graphs and shapes; "
    "with their projectors and weights they are one node. No formula of the paper was found: the "
    "form is the reference's.",
    trained="scikit-learn's digits",
)
TOLERANCE = 1e-5  # float32, short sums
SIZES = example.Sizes(width=12, hidden=16)


@functools.cache
def compiled() -> tuple[Any, CompiledModel]:
    torch.manual_seed(0)
    model = example.Astrea(SIZES).eval()
    image = torch.randn(3, SIZES.side, SIZES.side)
    return model, moec.compile(model, (image,), kv_cache=False, verify=False)


def test_one_node_of_four_kinds() -> None:
    _, artifact = compiled()
    (block,) = artifact.blocks
    assert (block.experts, block.top_k) == (4, 4)
    assert (block.router, block.form) == ("softmax, all", "all experts, weighed")
    (step,) = [step for step in artifact.pass_results if step.name == "recognise-mixtures"]
    (node,) = [op for op in step.program.graph.ops if op.name == "moe.mixture"]
    assert node.body is not None
    assert len(node.body.outputs) == 4
    kinds = {op.name.split(".")[1] for op in node.body.ops}
    assert {"sigmoid", "convolution", "gelu", "tanh"} <= kinds  # one of each expert's own
    parts = sum(
        p.numel()
        for m in ("experts", "projectors")
        for p in getattr(compiled()[0].vision, m).parameters()
    )
    assert block.parameters == parts


@pytest.mark.parametrize("count", [0, 1, 17])
def test_equal_to_eager(count: int) -> None:
    model, artifact = compiled()
    image = torch.randn(count, SIZES.side, SIZES.side)
    with torch.no_grad():
        right = model(image)
    torch.testing.assert_close(artifact(image), right, rtol=TOLERANCE, atol=TOLERANCE)


def test_what_trains_it_is_not_compiled() -> None:
    """No random number of the residual connections, which stay, and no second encoder."""
    _, artifact = compiled()
    graph = artifact.pass_results[-1].program.graph
    assert not any("rand" in op.name for op in graph.ops)
    parameters = sum(p.numel() for p in compiled()[0].parameters())
    assert artifact.report().parameters == parameters


def test_it_learns() -> None:
    torch.manual_seed(0)
    model = example.Astrea(SIZES)
    losses = example.train(model, 80)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_record(keep: Keep) -> None:
    figures = [
        Figure("gain over 12 benchmarks", "not measured", "+4.7 %", "no trained experts here")
    ]
    keep(record_of(compiled()[1], SOURCE, f"{TOLERANCE:g}", figures))
