"""MomentumSMoE: one state value between consecutive MoE layers, updated by the combine, and eager's
logits for stacks of heavy ball, Adam and robust momentum."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import nn

import moec
from docs.systems import Figure, Source
from moec import CompiledModel
from tests.systems.records import Keep, load, record_of

example = load("01_momentum_smoe")
SOURCE = Source(
    number=1,
    title="MomentumSMoE",
    paper="2410.14574",
    example="01_momentum_smoe",
    process="autoregressive",
    modalities=("text",),
    adds="The state that travels through depth stays one value from layer to layer, and its update "
    "mu * m + u is the addend of the kernel that combines the experts' rows.",
    trained="a repeating sequence",
)
TOLERANCE = 1e-5  # float32, sums of tens of terms, twelve normalised layers


@functools.cache
def compiled(method: str) -> tuple[nn.Module, CompiledModel]:
    torch.manual_seed(0)
    model, inputs = example.small(method)
    return model, moec.compile(model, inputs, kv_cache=False, verify=False)


@pytest.mark.parametrize("method", ["heavy ball", "adam"])
def test_recognised_and_equal_to_eager(method: str) -> None:
    model, ours = compiled(method)
    routers = [(b.experts, b.router, b.activation) for b in ours.blocks]
    layers = example.SMALL.layers if method == "heavy ball" else 2
    assert routers == [(example.SMALL.experts, "top-2, softmax", "relu")] * layers
    for shape in ((1, 1), (3, 20)):
        ids = torch.randint(example.SMALL.vocabulary, shape)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), model(ids), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("method", "layers", "fused"), [("heavy ball", 6, 6), ("adam", 2, 1)])
def test_the_update_is_part_of_the_combine(method: str, layers: int, fused: int) -> None:
    """Each layer's state goes to the next one along one edge. In Adam's layer, other states also
    read the experts' results, so its combine is not changed."""
    graph = compiled(method)[1].graph
    combines = [op for op in graph.ops if op.name == "moe.combine"]
    added = [op for op in combines if op.attrs.get("added")]
    assert (len(combines), len(added)) == (layers, fused)
    for before, after in itertools.pairwise(added):
        state = graph.producers[after.inputs[-1]]
        while state.name == "aten.reshape.default":
            state = graph.producers[state.inputs[0]]
        assert (state.name, state.attrs["other"]) == ("aten.mul.Tensor", example.SMALL.mu)
        source = graph.producers[state.inputs[0]]
        while source.name == "aten.reshape.default":
            source = graph.producers[source.inputs[0]]
        assert source is before


def test_robust_momentum_equals_heavy_ball_without_looking_ahead() -> None:
    """With the gradient taken at x itself and the factors of heavy ball, one layer is the other."""
    torch.manual_seed(0)
    ball = example.MomentumLayer(example.SMALL, "heavy ball").eval()
    robust = example.MomentumLayer(example.SMALL, "robust").eval()
    robust.load_state_dict(ball.state_dict())
    x, m = torch.randn(2, 3, 16), torch.zeros(2, 3, 16)
    c = example.SMALL
    alpha = c.kappa * (1 - c.rho) ** 2 * (1 + c.rho)
    with torch.no_grad():
        (ours,), (theirs,) = robust(x, (m,))[1], ball(x, (m,))[1]
    torch.testing.assert_close(ours, alpha * theirs)


def test_it_learns() -> None:
    torch.manual_seed(0)
    model = example.MomentumSMoE(
        example.Config(layers=2, width=16, heads=2, experts=4, vocabulary=6, context=16)
    )
    ids = torch.arange(16).remainder(6).expand(2, -1)
    losses = example.train(model, ids, 25)
    assert losses[-1] < losses[0] / 2


def in_the_authors_code(name: str) -> int:
    """The parameters of TransformerSeq in models.py of github.com/rachtsy/MomentumSMoE with the
    sizes of its scripts: other than here, it has three norms per layer beside the momentum layer's
    own, and one learned position per distance, [D / heads, 2 * block], in place of one per token.
    """
    c = example.PUBLISHED[name]
    words = 2 * c.vocabulary * c.width + c.vocabulary
    positions = c.width // c.heads * 2 * c.context
    experts = c.experts * 2 * (c.width**2 + c.width)
    gate, norms = c.experts * (c.width + 1), 4 * 2 * c.width
    return words + positions + c.layers * (4 * c.width**2 + experts + gate + norms)


@pytest.mark.parametrize("name", example.PUBLISHED)
def test_published_sizes(name: str) -> None:
    total, _ = example.published(name)
    assert total == pytest.approx(in_the_authors_code(name), rel=0.01)


DIFFERS = "other positions and norms"


def test_record(keep: Keep) -> None:
    figures = []
    for name in example.PUBLISHED:
        total, active = example.published(name)
        ours = f"{total / 1e6:.1f}M, {active / 1e6:.1f}M active"
        paper = f"{in_the_authors_code(name) / 1e6:.1f}M, counted from the authors' code"
        figures.append(Figure(f"parameters, {name}, vocabulary 267,735", ours, paper, DIFFERS))
    missing = ("Adam's first layer: its three states are element-wise loops after the combine",)
    keep(record_of(compiled("heavy ball")[1], SOURCE, f"{TOLERANCE:g}", figures, missing))
