"""Experts with a limited number of rows, counted per text or in a random order: the einsums over
slots are removed, and dropped choices have a weight of zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moec.capture import capture
from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate
from moec.passes.core import runner
from moec.passes.recognise import RECOGNISERS
from moec.passes.simplify.canonicalise import Canonicalise
from moec.report.blocks import blocks
from tests.passes.forms.sizes import D, E
from tests.passes.forms.stacks import Stacks

LIMIT = 3


def table(mask: Tensor, weight: Tensor, collide: bool = False) -> Tensor:
    """[.., N, E] masks and weights [.., N] -> combine weights [.., N, E, LIMIT], places counted
    along N; `collide` gives all rows of an expert the first place."""
    position = torch.zeros_like(mask) if collide else mask.cumsum(-2) - mask
    selected = mask * (mask.cumsum(-2) <= LIMIT)
    spot = F.one_hot((position * selected).sum(-1), LIMIT).float()
    return (weight[..., None] * selected)[..., None] * spot[..., None, :]


class PerText(Stacks):
    """x [B, N, D]: an expert takes the first rows of each text."""

    collide = False

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router.gate(x).softmax(-1).max(-1)
        combine = table(F.one_hot(chosen, E), weight, self.collide)
        rows = torch.einsum("bnd,bnec->ebcd", x, combine.bool().to(x.dtype))
        hidden = F.gelu(torch.einsum("ebcd,ehd->ebch", rows, self.up) + self.bias[:, None, None])
        return torch.einsum(
            "ebcd,bnec->bnd", torch.einsum("ebch,edh->ebcd", hidden, self.down), combine
        )


class Colliding(PerText):
    collide = True


class Numbered(Stacks):
    """x [T, D], numbers [T]: an expert takes the rows of the greatest numbers."""

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        weight, chosen = self.router.gate(x).softmax(-1).max(-1)
        mask = F.one_hot(chosen, E)
        best = (mask * numbers[:, None]).topk(LIMIT, 0).indices
        combine = table(mask * torch.zeros_like(mask).scatter(0, best, 1), weight)
        rows = torch.einsum("tec,td->ecd", combine.bool().to(x.dtype), x)
        hidden = F.gelu(torch.einsum("ecd,ehd->ech", rows, self.up) + self.bias[:, None])
        return torch.einsum("tec,ecd->td", combine, torch.einsum("ech,edh->ecd", hidden, self.down))


def recognised(module: nn.Module, *inputs: Tensor) -> tuple[Program, list[str]]:
    torch.manual_seed(1)
    for param in module.parameters():
        torch.nn.init.normal_(param, std=0.4)
    program = capture(module, inputs).program
    steps = runner.run(program, [Canonicalise(), *RECOGNISERS])
    program = steps[-1].program
    with torch.no_grad():
        expected = module(*inputs)
    (actual,) = evaluate(program.graph, list(inputs), program.weights)
    # Sums over at most H terms in another order.
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    return program, [d.reason for step in steps for d in step.declined]


def shapes(program: Program) -> set[tuple[object, ...]]:
    return {v.shape for op in program.graph.ops for v in op.outputs if len(v.shape) > 2}


def drops_rows(program: Program) -> bool:
    """Whether the rows of weight zero have no expert, so that none computes them."""
    return any(op.name == "aten.masked_fill.Scalar" for op in program.graph.ops)


def test_places_of_each_text() -> None:
    """Rows of two texts that are alike: each text keeps its first three."""
    x = torch.randn(1, 1, D).expand(2, 7, D).contiguous()
    program, _ = recognised(PerText(), x)
    assert [(b.experts, b.top_k) for b in blocks(program.graph)] == [(E, 1)]
    assert not [shape for shape in shapes(program) if shape[-1] == LIMIT]
    assert drops_rows(program)


def test_numbers_choose_the_rows() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, D).expand(9, D).contiguous()
    program, _ = recognised(Numbered(), x, torch.rand(9))
    assert [(b.experts, b.top_k) for b in blocks(program.graph)] == [(E, 1)]
    assert not [shape for shape in shapes(program) if shape[-1] == LIMIT]
    assert drops_rows(program)


def test_rows_that_share_a_place_are_no_block() -> None:
    """Their sum goes through the expert."""
    program, reasons = recognised(Colliding(), torch.randn(2, 7, D))
    assert blocks(program.graph) == ()
    assert "the numbers differ" in " ".join(reasons)


class Rows(nn.Module):
    """A loop in which an expert takes LIMIT of its rows: the first, or those of the least numbers;
    results are added to zeros, or written over a copy of the tokens."""

    def __init__(self, numbered: bool, over: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.numbered, self.over = numbered, over

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        y = x.clone() if self.over else torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            tokens = torch.nonzero(chosen == index)[:, 0]
            if self.numbered:
                tokens = tokens[numbers[tokens].argsort()]
            y[tokens[:LIMIT]] = expert(x[tokens[:LIMIT]])
        return y * weight[:, None]


@pytest.mark.parametrize("over", [False, True], ids=["zeros", "tokens"])
@pytest.mark.parametrize("numbered", [False, True], ids=["first", "numbered"])
def test_a_loop_over_limited_rows(numbered: bool, over: bool) -> None:
    x = torch.randn(1, D).expand(9, D).contiguous()
    program, _ = recognised(Rows(numbered, over), x, torch.rand(9))
    (block,) = blocks(program.graph)
    order = " in the order of numbers" if numbered else ""
    assert block.router == f"softmax, top-1, at most {LIMIT} per expert, by token{order}"
    assert block.zero == ("1 copy" if over else "")


class UnequalLimits(nn.Module):
    """Only one expert takes a limited number of rows, more than a proof has."""

    def __init__(self, limits: tuple[int | None, ...]) -> None:
        super().__init__()
        self.gate, self.limits = nn.Linear(D, E), limits
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            tokens = torch.nonzero(chosen == index)[:, 0][: self.limits[index]]
            y[tokens] = expert(x[tokens])
        return y * weight[:, None]


@pytest.mark.parametrize("number", range(0, E, 2))
def test_limits_that_differ_are_no_capacity(number: int) -> None:
    limits: list[int | None] = [None] * E
    limits[number] = 300
    x = torch.randn(1, D).expand(320, D).contiguous()
    program, reasons = recognised(UnequalLimits(tuple(limits)), x)
    assert blocks(program.graph) == ()
    assert any(
        "its experts take at most different numbers of rows: " in reason and "300" in reason
        for reason in reasons
    )
