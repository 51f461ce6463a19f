"""M3-JEPA: stack-then-gather becomes sparse dispatch, the two calls of the connector one block, and
stored vectors give the results of the end-to-end model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import moec
from docs.systems import NO_FIGURE, Figure, Source
from moec import CompiledModel
from tests.systems.records import Keep, load, record_of

example = load("11_m3_jepa")
SOURCE = Source(
    number=11,
    title="M3-JEPA (Alt-MoE)",
    paper="2409.05929",
    example="11_m3_jepa",
    process="encoder",
    modalities=("text", "image"),
    adds="Every expert is evaluated in the authors' code; compiled, a vector meets its own alone. "
    "The calls of two objectives share their weights and run as one block over twice the rows.",
    trained="scikit-learn's digits and their names",
)
TOLERANCE = 1e-5  # float32, sums of at most some hundred terms in another order
SIZES = example.Sizes(text=16, image=64, hidden=24, experts=6, top_k=2)


@functools.cache
def connector() -> Any:
    torch.manual_seed(0)
    return example.Connector(SIZES).eval()


@functools.cache
def encoder() -> Any:
    torch.manual_seed(1)
    return example.TextEncoder(27, SIZES.text).requires_grad_(False).eval()


@functools.cache
def stored() -> CompiledModel:
    query = example.Query(connector())
    return moec.compile(query, (torch.randn(9, SIZES.text),), kv_cache=False, verify=TOLERANCE)


def test_one_sparse_block_of_both_calls() -> None:
    (block,) = stored().blocks
    assert (block.experts, block.top_k, block.router) == (6, 2, "softmax, top-2")
    assert block.form == "evaluate all, then select"
    assert block.active_parameters * 3 == block.parameters  # K / N of the work of all
    graph = stored().pass_results[-1].program.graph
    rows = [str(op.outputs[0].shape[0]) for op in graph.ops if op.name == "grouped.linear"]
    assert rows == ["4*T"] * len(rows) != []


@pytest.mark.parametrize("count", [0, 1, 50])
def test_equal_to_eager(count: int) -> None:
    text = torch.randn(count, SIZES.text)
    with torch.no_grad():
        expected = example.Query(connector())(text)
    for output, eager in zip(stored()(text), expected, strict=True):
        torch.testing.assert_close(output, eager, rtol=TOLERANCE, atol=TOLERANCE)


def test_stored_vectors_are_as_good_as_the_encoder() -> None:
    ids = example.spelled(torch.arange(10))
    query = example.Query(connector(), encoder())
    full = moec.compile(query, (ids,), kv_cache=False, verify=TOLERANCE)
    for a, b in zip(full(ids), stored()(encoder()(ids)), strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def test_it_learns_and_losses_are_not_compiled() -> None:
    """Chance finds a tenth of the digits."""
    labels, images = example.digits(20)
    text = encoder()(example.spelled(labels))
    torch.manual_seed(0)
    learner = example.Connector(SIZES)
    losses = example.train(learner, text, images, 200)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    with torch.no_grad():
        _, nearest = example.Query(learner.eval())(text[:10])
    scores = F.normalize(nearest, dim=-1) @ F.normalize(images, dim=-1).T
    assert example.recall(scores) > 0.5
    names = {op.name for op in stored().captured.program.graph.ops}
    assert not any("cross_entropy" in name or "dropout" in name for name in names)


def test_record(keep: Keep) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in example.Connector(example.PUBLISHED).parameters())
    ours = f"{count / 1e6:.0f}M in the connector"
    figures = [
        Figure("parameters at hidden 2048, 12 experts", ours, "not found", NO_FIGURE),
        Figure(
            "experts' work of all",
            "4 of 12 a vector",
            "every expert, then gathered",
            "a property of the authors' code, no figure",
        ),
    ]
    keep(record_of(stored(), SOURCE, f"{TOLERANCE:g}", figures))
