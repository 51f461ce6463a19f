"""Z-code M3: random token selection is an explicit op that is removed where it has no effect,
pruning equals masking, and the experts of two models are combined."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from docs.systems import Figure, Source
from moec import CompiledModel
from moec.ir.interpret.evaluate import evaluate
from moec.passes.approximate.aggregate_experts import AggregateExperts
from tests.systems.records import Keep, load, record_of

example = load("14_zcode_m3")
SOURCE = Source(
    number=14,
    title="Z-code M3",
    paper="2109.10465",
    example="14_zcode_m3",
    process="autoregressive",
    modalities=("text",),
    adds="Random token selection is made of ops that read their numbers from an input, and the "
    "compiler removes it where no expert can overflow; where one can, the experts are a block and "
    "the router stays as written. Pruning and aggregation are passes.",
    trained="generated sentences",
)
TOLERANCE = 1e-4  # float32, four layers with attention
SIZES = example.Sizes(
    vocabulary=16, languages=2, width=8, hidden=12, heads=2, experts=4, longest=12
)
NAMES = ("source", "target", "first", "second")


@functools.cache
def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return example.ZCodeM3(SIZES).eval()


@functools.cache
def compiled() -> CompiledModel:
    return example.compiled(model(), SIZES)


def evaluated(model: CompiledModel, inputs: tuple[Tensor, ...]) -> Tensor:
    """What the last graph gives, without kernels."""
    program = model.pass_results[-1].program
    (result,) = evaluate(program.graph, list(inputs), program.weights)
    return result


def switches(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, example.Switch)]


def masked(module: nn.Module, allowed: list[list[int]]) -> Any:
    """A gate whose other experts' logits are minus infinity: eager."""

    def only(experts: list[int]) -> Any:
        hidden = torch.full((SIZES.experts,), -torch.inf).index_fill(0, torch.tensor(experts), 0.0)
        return lambda gate, args, logits: logits + hidden

    return [
        layer.gate.register_forward_hook(only(experts))
        for layer, experts in zip(switches(module), allowed, strict=True)
    ]


def test_recognised_and_equal_to_eager() -> None:
    assert [(b.experts, b.top_k, b.router) for b in compiled().blocks] == [
        (4, 1, "softmax, top-1")
    ] * 2
    for count, length in ((1, 2), (4, 9)):
        inputs = example.example(SIZES, count, length)
        with torch.no_grad():
            expected = model()(*inputs)
        torch.testing.assert_close(compiled()(*inputs), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_token_selection_is_gone_where_it_cannot_bind() -> None:
    """Its numbers are inputs that nothing reads, and nothing is sorted by them."""
    graph = compiled().pass_results[-1].program.graph
    by_name = {value.name: value for value in graph.inputs}
    assert not graph.readers.get(by_name["first"], ())
    assert not graph.readers.get(by_name["second"], ())
    assert not any("topk" in op.name or "scatter" in op.name for op in graph.ops)


@functools.cache
def limited() -> tuple[Any, CompiledModel]:
    """A Switch layer whose experts take ceil(12 / 4 * 1.25) of 12 tokens."""
    torch.manual_seed(3)
    layer = example.Switch(replace(SIZES, factor=1.25, least=2)).eval()
    fixed = torch.export.Dim.STATIC
    inputs = (torch.randn(12, SIZES.width), torch.rand(12, SIZES.experts))
    shapes = ({0: fixed}, {0: fixed})
    return layer, moec.compile(layer, inputs, dynamic_shapes=shapes, verify=TOLERANCE)


@pytest.mark.parametrize("seed", range(3))
def test_token_selection_binds_as_its_numbers_say(seed: int) -> None:
    layer, artifact = limited()
    words = "softmax, top-1, weights changed"
    assert [(b.experts, b.router) for b in artifact.blocks] == [(4, words)]
    x = torch.randn(1, SIZES.width, generator=torch.Generator().manual_seed(seed)).repeat(12, 1)
    priority = torch.rand(12, SIZES.experts, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = layer(x, priority)
    output = artifact(x, priority)
    torch.testing.assert_close(output, expected, rtol=TOLERANCE, atol=TOLERANCE)
    chosen = int(layer.gate(x).argmax(-1)[0])
    first = priority[:, chosen].topk(4).indices.sort().values  # ceil(12 / 4 * 1.25)
    assert output.abs().sum(-1).nonzero()[:, 0].tolist() == first.tolist()


def test_pruning_is_masking() -> None:
    """The router over the kept experts chooses as one whose other logits are minus infinity."""
    calib = dict(zip(NAMES, example.example(SIZES, 8, 9), strict=True))
    pruned = example.compiled(model(), SIZES, "+prune-experts(keep=0.5)", calib=calib, build=False)
    assert [block.experts for block in pruned.blocks] == [2, 2]
    layers = [line for step in pruned.pass_results if step.damage for line in step.damage.layers]
    allowed = [
        sorted(int(n) for n in line.says.split("keeps ")[1].split(" of")[0].split(","))
        for line in layers
    ]
    inputs = example.example(SIZES, 3, 7)
    hooks = masked(model(), allowed)
    with torch.no_grad():
        expected = model()(*inputs)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(evaluated(pruned, inputs), expected, rtol=TOLERANCE, atol=TOLERANCE)


class Both(nn.Module):
    """Eager: the experts of two layers, and the logits of both side by side."""

    def __init__(self, first: Any, other: Any) -> None:
        super().__init__()
        self.first, self.other = first, other

    def forward(self, x: Tensor, priority: Tensor) -> Tensor:
        shares = torch.cat([self.first.gate(x), self.other.gate(x)], -1).softmax(-1)
        weight, chosen = shares.max(-1)
        experts = (*self.first.experts, *self.other.experts)
        rows = [weight[i] * experts[int(chosen[i])](x[i]) for i in range(len(x))]
        return torch.stack(rows)


def test_aggregation_routes_by_both_models_logits() -> None:
    """Shared weights are the mean; each expert keeps its logit."""
    other = model(5)
    both = example.compiled(model(), SIZES, [AggregateExperts(other=other)], build=False)
    assert [block.experts for block in both.blocks] == [8, 8]
    torch.manual_seed(0)
    mean = example.ZCodeM3(SIZES).eval()
    with torch.no_grad():
        states = [m.state_dict() for m in (model(), other)]
        mean.load_state_dict({name: (states[0][name] + states[1][name]) / 2 for name in states[0]})
    for side in ("encoder", "decoder"):
        layers = (getattr(m, side)[1].ffn for m in (model(), other))
        getattr(mean, side)[1].ffn = Both(*layers)
    inputs = example.example(SIZES, 3, 7)
    with torch.no_grad():
        expected = mean(*inputs)
    torch.testing.assert_close(evaluated(both, inputs), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_it_learns_and_losses_are_not_compiled() -> None:
    torch.manual_seed(0)
    losses = example.train(example.ZCodeM3(replace(SIZES, width=16, hidden=24)), 80)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert len(compiled().captured.program.graph.outputs) == 1


def test_record(keep: Keep) -> None:
    count = example.parameters(example.PUBLISHED)
    ours = f"{count / 1e9:.1f}B"
    figures = [Figure("parameters, 50 languages", ours, "10B", "widths chosen here")]
    keep(record_of(compiled(), SOURCE, f"{TOLERANCE:g}", figures))
