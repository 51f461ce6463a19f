"""Tokens of padding get no expert: a mask is an input of the routing, beside the logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moec.capture import capture
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import print_graph
from moec.passes.core import runner
from moec.passes.core.runner import Declined
from moec.pipeline import CANONICALISE, RECOGNISE
from moec.report.blocks import blocks
from moec.report.data import Block
from tests.passes.forms.experts import Mlp
from tests.passes.forms.sizes import D, E


class TwoBest(nn.Module):
    """NLLB (arXiv 2207.04672): the best and the second expert, each found by an argmax, as masks in
    which rows of padding are zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(Mlp() for _ in range(E))

    def kept(self, padding: Tensor) -> Tensor:
        return ~padding.bool()

    def weighed(self, shares: Tensor, mask: Tensor) -> Tensor:
        return shares

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        scores, mask = self.gate(x).softmax(-1), self.kept(padding).long()[:, None]
        first = F.one_hot(scores.argmax(-1), E)
        second = F.one_hot(scores.masked_fill(first.bool(), -torch.inf).argmax(-1), E)
        first, second = first * mask, second * mask
        best, next_best = (scores * first).sum(-1), (scores * second).sum(-1)
        total = (best + next_best).clamp(min=torch.finfo(scores.dtype).eps)
        shares = (best / total)[:, None] * first + (next_best / total)[:, None] * second
        shares = self.weighed(shares, mask)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(shares[:, number] != 0)[0]
            out[rows] += shares[rows, number, None] * expert(x[rows])
        return out


class AllExperts(TwoBest):
    """Rows of padding reach every expert."""

    def weighed(self, shares: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask.bool(), shares, 0.25)


class NoWeight(TwoBest):
    """Rows of padding reach experts with the weight 0."""

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        return self.loop(x, weights * self.kept(padding)[:, None], chosen)

    def loop(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == number)
            out.index_add_(0, rows, weights[rows, slot, None] * expert(x[rows]))
        return out


class NoExpert(NoWeight):
    """Rows of padding choose an expert that does not exist."""

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        return self.loop(x, weights, torch.where(self.kept(padding)[:, None], chosen, E))


def run(
    form: type[TwoBest], dtype: torch.dtype = torch.long
) -> tuple[Program, tuple[Block, ...], list[Declined]]:
    """Float32 with sums of at most 16 terms: 1e-5."""
    torch.manual_seed(0)
    padding = torch.tensor([0, 0, 1, 0, 1, 1]).to(dtype)
    captured = capture(form().eval(), (torch.randn(6, D), padding))
    steps = runner.run(captured.program, [p for f in (CANONICALISE, RECOGNISE) for p in f.passes])
    program = steps[-1].program
    for count in (0, 1, 2, 9):
        for share in (0.0, 0.4, 1.0):
            inputs = [torch.randn(count, D), (torch.rand(count) < share).to(dtype)]
            (actual,) = evaluate(program.graph, inputs, program.weights)
            expected = captured.eager(*inputs)[0]
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    return program, blocks(program.graph), [d for step in steps for d in step.declined]


@pytest.mark.parametrize("form", [TwoBest, NoWeight, NoExpert])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_padding(form: type[TwoBest], dtype: torch.dtype) -> None:
    _, (block,), _ = run(form, dtype)
    assert (block.experts, block.top_k, block.form) == (E, 2, "static loop")


def test_text(golden: Any) -> None:
    golden(print_graph(run(TwoBest)[0].graph))


def test_rows_of_padding_are_in_no_product() -> None:
    program, *_ = run(TwoBest)
    (dispatch,) = (op for op in program.graph.ops if op.name == "moe.dispatch")
    x, padding = torch.randn(6, D), torch.tensor([1, 0, 1, 1, 0, 1])
    values = evaluate(
        replace(program.graph, outputs=(dispatch.outputs[2],)), [x, padding], program.weights
    )
    assert values[0].tolist()[-1] == 4  # two rows, two experts each


def test_padding_that_reaches_every_expert() -> None:
    """Not two experts a token, but those whose weight is not zero."""
    _, (block,), declined = run(AllExperts)
    assert (block.top_k, block.form) == (E, "experts whose weight is not zero")
    assert [d.rule for d in declined] == ["recognise-routers"]
