"""GNT-MOVE: the cosine gate is recognised, the permanent expert is a shared expert with weight one
half, and colours equal eager's with the noise off."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

import moec
from docs.systems import NO_FIGURE, Figure, Source
from moec import CompiledModel
from tests.systems.records import Keep, load, record_of

example = load("08_gnt_move")
SOURCE = Source(
    number=8,
    title="GNT-MOVE",
    paper="2308.11793",
    example="08_gnt_move",
    process="encoder",
    modalities=("image",),
    adds="Routers may take any scores: the cosine gate with its temperatures is a part of the "
    "graph before a recognised softmax and top-k. The permanent expert is added by the combine.",
    trained="random rows",
)
TOLERANCE = 1e-5  # float32, sums of at most 64 terms, two layers


@functools.cache
def compiled() -> tuple[nn.Module, CompiledModel]:
    torch.manual_seed(0)
    model, inputs = example.small()
    return model, moec.compile(model, inputs, verify=False)


def test_recognised_with_a_permanent_expert_of_weight_one_half() -> None:
    _, ours = compiled()
    assert len(ours.blocks) == 2 * example.SMALL.depth
    for block in ours.blocks:
        assert (block.experts, block.top_k, block.router) == (4, 2, "softmax, top-2")
        assert block.shared == "added, the sum divided by 2"
    combines = [op for op in ours.graph.ops if op.name == "moe.combine"]
    assert [op.attrs.get("added") for op in combines] == [True] * len(ours.blocks)


def test_equal_to_eager_with_the_noise_off() -> None:
    model, ours = compiled()
    for sizes in ((1, 1, 1), (4, 7, 3)):
        inputs = example.example_inputs(example.SMALL, *sizes)
        with torch.no_grad():
            torch.testing.assert_close(ours(*inputs), model(*inputs), rtol=1e-4, atol=TOLERANCE)


def test_the_gate_is_of_cosines_with_a_temperature_of_each_expert() -> None:
    torch.manual_seed(0)
    gate, x = example.CosineGate(example.SMALL).eval(), torch.randn(5, example.SMALL.width)
    with torch.no_grad():
        gate.temperature.copy_(torch.tensor([0.25, 0.5, 1.0, 2.0]))
        z = x @ gate.project.weight.T
        cosines = F.cosine_similarity(z[:, :, None], gate.columns[None], dim=1)
        torch.testing.assert_close(gate(x), (cosines / gate.temperature).softmax(-1))
        torch.testing.assert_close(gate(3 * x), gate(x))


def test_noise_is_for_training_alone() -> None:
    gate, x = example.CosineGate(example.SMALL), torch.randn(5, example.SMALL.width)
    assert torch.equal(gate.eval()(x), gate(x))
    assert not torch.equal(gate.train()(x), gate(x))
    ops = {op.name for op in compiled()[1].captured.program.graph.ops}
    assert not any("rand" in name for name in ops)


def test_rays_that_agree_have_no_consistency_loss() -> None:
    points = torch.randn(6, 3)
    gates = torch.rand(6, 4).softmax(-1)
    order = torch.randperm(6)
    assert float(example.consistency_loss(gates, gates[order], points, points[order])) < 1e-6
    assert float(example.consistency_loss(gates, gates.flip(-1), points, points)) > 1e-3


def test_training_balances_the_experts() -> None:
    torch.manual_seed(0)
    layer = example.ViewExperts(example.Config(width=16, noise=0.0)).train()
    x = torch.randn(64, 16) + 2
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    spreads = []
    for _ in range(30):
        layer(x)
        spreads.append(float(example.squared_variation(layer.probabilities.detach().sum(0))))
        optimizer.zero_grad()
        layer.loss.backward()
        optimizer.step()
    assert spreads[-1] < spreads[0] / 2


def test_record(keep: Keep) -> None:
    total, active = example.published("depth 8")
    ours = f"{total / 1e6:.2f}M, {active / 1e6:.2f}M active"
    quantity = "parameters of the transformer, depth 8, width 64"
    figures = [Figure(quantity, ours, "not obtained", NO_FIGURE)]
    keep(record_of(compiled()[1], SOURCE, f"{TOLERANCE:g}", figures))
