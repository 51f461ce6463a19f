"""A router whose last choice may be replaced by an input of the model: moe.route with moe.force."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.ir.interpret.evaluate import evaluate
from moec.ir.text import parse, print_graph

D, E, K = 4, 5, 2


class Forced(nn.Module):
    """x [T, D], forced [T] -> [T, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 6), nn.ReLU(), nn.Linear(6, D)) for _ in range(E)
        )

    def choose(self, x: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
        scores = 2.0 * self.gate(x).softmax(-1)
        chosen = scores.topk(K, dim=-1).indices
        column = forced[:, None]
        last = torch.where((chosen == column).any(-1, keepdim=True), chosen[:, 1:], column)
        chosen = torch.cat([chosen[:, :1], last], -1)
        return scores.gather(-1, chosen), chosen

    def forward(self, x: Tensor, forced: Tensor) -> Tensor:
        weights, chosen = self.choose(x, forced)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y


class Renormalised(Forced):
    """A forced expert changes the weights of the others, too."""

    def choose(self, x: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = super().choose(x, forced)
        return weights / weights.sum(-1, keepdim=True), chosen


class First(Forced):
    """The forced expert takes the first place, not the last."""

    def choose(self, x: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(x).softmax(-1)
        chosen = torch.cat([forced[:, None], scores.topk(K, dim=-1).indices[:, 1:]], -1)
        return scores.gather(-1, chosen), chosen


def steps(module: nn.Module, stop: str | None) -> Any:
    torch.manual_seed(0)
    tokens = torch.export.Dim("T")
    inputs = (torch.randn(7, D), torch.randint(E, (7,)))
    return moec.compile(
        module.eval(), inputs, dynamic_shapes=({0: tokens}, {0: tokens}), stop_after=stop,
        verify=False, kv_cache=False,
    )  # fmt: skip


@functools.cache
def lowered() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    module = Forced()
    return module, steps(module, None)


def test_one_block_whose_last_choice_is_forced() -> None:
    _, compiled = lowered()
    (block,) = compiled.blocks
    assert block.router == "softmax, top-2, times 2, the last forced by forced"
    by_name = {step.name: step.program.graph for step in compiled.pass_results}
    names = [op.name for op in by_name["recognise-routers"].ops]
    assert (names.count("moe.route"), names.count("moe.force")) == (1, 1)
    assert not any(name.startswith("aten.topk") for name in names)
    assert "moe.force" not in [op.name for op in by_name["expand-forced"].ops]


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_equal_to_eager(tokens: int) -> None:
    module, compiled = lowered()
    inputs = torch.randn(tokens, D), torch.randint(E, (tokens,))
    with torch.no_grad():
        expected = module(*inputs)
    torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-5, atol=1e-5)
    for step in compiled.pass_results:
        if step.name in ("recognise-routers", "expand-forced"):
            program = step.program
            (y,) = evaluate(program.graph, list(inputs), program.weights)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_text(golden: Any) -> None:
    (step,) = [s for s in lowered()[1].pass_results if s.name == "recognise-routers"]
    text = print_graph(step.program.graph)
    assert print_graph(parse(text)) == text
    golden(text)


@pytest.mark.parametrize("kind", [Renormalised, First])
def test_other_ways_to_force_read_choices(kind: type[nn.Module]) -> None:
    module = kind()
    compiled = steps(module, "recognise-routers")
    words = "softmax, top-2, some choices replaced, weights of its own"
    assert [block.router for block in compiled.blocks] == [words]
    inputs, program = (
        (torch.randn(40, D), torch.randint(E, (40,))),
        compiled.pass_results[-1].program,
    )
    (y,) = evaluate(program.graph, list(inputs), program.weights)
    torch.testing.assert_close(y, module(*inputs).detach(), rtol=1e-5, atol=1e-5)
