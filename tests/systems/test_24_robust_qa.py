"""Robust QA: einsums over slots per text become tables, and an attribute determines whether dropped
rows give zero or their input."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import moec
from docs.systems import COMPARABLE, NO_FIGURE, Figure, Source
from moec import CompiledModel
from moec.ir.sizes.dims import symbols
from tests.systems.records import Keep, load, record_of

example = load("24_robust_qa")
SOURCE = Source(
    number=24,
    title="Robust QA",
    paper="2204.09598",
    example="24_robust_qa",
    process="encoder",
    modalities=("text",),
    adds="Dispatch einsums over [B, N, E, C] become tables of choices, counted for each text; rows "
    "that a Switch expert drops are a copy, an expert without a network. Random numbers are an "
    "input. The record is the MoE head's.",
)
TOLERANCE = 1e-5  # float32, sums of at most 32 terms, through three layers


@functools.cache
def compiled(head: str) -> tuple[nn.Module, CompiledModel]:
    torch.manual_seed(0)
    model, inputs = example.small(head)
    two = {
        0: torch.export.Dim.STATIC,
        1: torch.export.Dim.AUTO,
    }  # texts: fewer names of sizes are captured faster
    shapes = (two, two)
    return model, moec.compile(model, inputs, dynamic_shapes=shapes, kv_cache=False, verify=False)


def test_einsum_dispatch_becomes_a_table() -> None:
    _, ours = compiled("moe")
    assert [(b.experts, b.top_k, b.form) for b in ours.blocks] == [
        (4, 2, "dense dispatch with capacity")
    ]
    assert not [op for op in ours.graph.ops if "bmm" in op.name]
    shapes = [v.shape for op in ours.graph.ops for v in op.outputs]
    capacities = [shape for shape in shapes if any("Max" in str(d) for d in shape)]
    assert not [shape for shape in capacities if sum(bool(symbols(d)) for d in shape) > 1]


def test_drop_policies_are_attributes() -> None:
    """Dropped choices of the MoE head have no expert, dropped rows of the Switch head a copy."""
    for head, kinds in (("moe", []), ("switch", [("copy",)])):
        _, ours = compiled(head)
        zero = [op.attrs["kinds"] for op in ours.graph.ops if op.name == "moe.zero_experts"]
        assert zero == kinds
        fills = [op.attrs["value"] for op in ours.graph.ops if op.name == "aten.masked_fill.Scalar"]
        assert (example.SMALL.experts in fills) == (head == "moe")  # no expert, no row to compute
    (block,) = compiled("switch")[1].blocks
    assert block.zero == "1 copy"
    assert "per expert, by token in the order of numbers" in block.router


@pytest.mark.parametrize("head", example.HEADS)
@pytest.mark.parametrize("shape", [(2, 3), (2, 30)], ids=str)
def test_logits_equal_eager_with_the_numbers_fixed(head: str, shape: tuple[int, int]) -> None:
    model, ours = compiled(head)
    ids = torch.randint(example.SMALL.vocabulary, shape)
    results = []
    for seed in range(2):
        numbers = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = model(ids, numbers)
        for output, logits in zip(ours(ids, numbers), expected, strict=True):
            torch.testing.assert_close(output, logits, rtol=TOLERANCE, atol=TOLERANCE)
        results.append(expected[0])
    if shape == (2, 30):  # the numbers decide something: experts overflow
        assert not torch.equal(*results)


def test_second_experts_are_kept_by_their_numbers_and_fit_after_all_first_ones() -> None:
    """Tokens are of two kinds, with probabilities 18 : 2 or 2 : 18 of the first two experts: a
    second expert weighs 0.1, and is kept where the number is below 0.1 / 0.2. Experts take 4."""
    moe = example.MoE(example.SMALL)
    x = torch.zeros(2, 8, example.SMALL.width)
    x[:, :, 0] = 1
    x[1, 1] = x[1, 1].roll(1)
    numbers = torch.tensor([[0.51, 0.49, 0.49, 0.51, 0.49, 0.49, 0.49, 0.49], [0.49] + [0.51] * 7])
    with torch.no_grad():
        moe.gate.weight.zero_()[:2, :2] = torch.tensor([[18.0, 2.0], [2.0, 18.0]]).log()
        combine = moe.route(x, numbers)
    firsts = {(0, token, 0, token): 0.9 for token in range(4)}
    seconds = {(0, token, 1, slot): 0.1 for slot, token in enumerate((1, 2, 4, 5))}
    others = {(1, token, 0, slot): 0.9 for slot, token in enumerate((0, 2, 3, 4))}
    expected = {**firsts, **seconds, **others, (1, 1, 1, 0): 0.9, (1, 0, 1, 1): 0.1}
    weights = {tuple(at): float(combine[tuple(at)]) for at in combine.nonzero().tolist()}
    assert weights == pytest.approx(expected)


def test_dropped_rows_give_zero_or_pass_through() -> None:
    """Eager matches the paper: all rows of one expert, of which few fit."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, example.SMALL.width).expand(1, 32, -1)
    numbers = torch.rand(1, 32)
    with torch.no_grad():
        moe = example.MoE(example.SMALL).eval()(x, torch.ones(1, 32))
        switch = example.Switch(example.SMALL)
        scaled = x * switch.gate(x).softmax(-1).max(-1).values[..., None]
        passed = (switch(x, numbers) == scaled).all(-1)
    assert int((moe.abs().sum(-1) > 0).sum()) == 10  # 32 * 1.25 / 4
    assert int(passed.sum()) == 32 - 10
    assert passed[0].tolist() == (numbers[0] > numbers[0].sort().values[9]).tolist()


def test_record(keep: Keep) -> None:
    encoder, moe, switch = (count / 1e6 for count in example.published("DistilBERT"))
    assert encoder == pytest.approx(example.PUBLISHED["DistilBERT"][1], rel=0.01)
    figures = [
        Figure("parameters of DistilBERT", f"{encoder:.1f}M", "66M", COMPARABLE),
        Figure(
            "with the MoE head, with a Switch layer", f"{moe:.1f}M, {switch:.1f}M", "-", NO_FIGURE
        ),
    ]
    keep(record_of(compiled("moe")[1], SOURCE, f"{TOLERANCE:g}", figures))
