"""A router that chooses by logits is not one that chooses by their sigmoids, nor one by sigmoids of
half the logits: above logits of 17 all sigmoids are 1 in float32, and different logits are tied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.stable_topk import FirstOfEquals

D, E, K = 8, 4, 2


class Chosen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList([nn.Linear(D, D) for _ in range(E)])

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(self.gate(x))
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return y


class ByLogits(Chosen):
    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        top, ids = logits.topk(K, dim=-1)
        return top.sigmoid(), ids


class ByLogitsGathered(Chosen):
    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids = logits.topk(K, dim=-1).indices
        return logits.sigmoid().gather(-1, ids), ids


class BySigmoids(Chosen):
    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = logits.sigmoid().topk(K, dim=-1)
        return weights, ids


class First(Chosen):
    """The best expert alone, with a weight of one: it says nothing about the scores."""

    def score(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.score(logits).topk(1, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids


class Halves(First):
    def score(self, logits: Tensor) -> Tensor:
        return (logits / 2).sigmoid()


class Rounded(First):
    def score(self, logits: Tensor) -> Tensor:
        return ((logits * 2).round() / 2).sigmoid()


class Less(First):
    def score(self, logits: Tensor) -> Tensor:
        return (logits - 8).sigmoid()


class Twice(First):
    def score(self, logits: Tensor) -> Tensor:
        return logits.sigmoid().sigmoid()


class Largest(First):
    """By arg-max, without weights."""

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids = (logits / 2).sigmoid().argmax(-1, keepdim=True)
        return torch.ones_like(ids, dtype=logits.dtype), ids


class LastOfEquals(Chosen):
    """In ascending order: of equal scores the last is chosen."""

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        ids = scores.argsort(-1)[:, -K:]
        return scores.gather(1, ids), ids


def compiled(form: type[Chosen]) -> tuple[nn.Module, moec.CompiledModel, dict[str, object]]:
    torch.manual_seed(0)
    module = form().eval()
    model = moec.compile(module, (torch.randn(6, D),), build=False, verify=False)
    graph = model.pass_results[-1].program.graph
    (router,) = [op for op in graph.ops if op.name in ("moe.gate", "moe.route")]
    return module, model, dict(router.attrs)


@pytest.mark.parametrize("form", [ByLogits, ByLogitsGathered])
def test_experts_chosen_by_logits(form: type[Chosen]) -> None:
    module, model, attrs = compiled(form)
    assert (attrs["score"], attrs["after"]) == ("none", "sigmoid")
    x = 200 * torch.randn(50, D)
    with torch.no_grad():
        expected, logits = module(x), module.gate(x)
    assert ((logits > 20).sum(-1) > K).any()  # more experts are saturated than are chosen
    program = model.pass_results[-1].program
    (y,) = evaluate(program.graph, [x], program.weights)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)


def test_experts_chosen_by_sigmoids() -> None:
    _, _, attrs = compiled(BySigmoids)
    assert attrs["score"] == "sigmoid"
    assert attrs.get("after", "none") == "none"


@pytest.mark.parametrize("form", [Halves, Rounded, Less, Twice, Largest, LastOfEquals])
def test_scores_that_saturate_elsewhere(form: type[Chosen]) -> None:
    torch.manual_seed(0)
    module = form().eval()
    model = moec.compile(module, (torch.randn(6, D),), build=False, verify=False)
    assert len(model.blocks) == 1
    program = model.pass_results[-1].program
    for scale in (1, 30, 60):
        x = scale * torch.randn(100, D)
        with torch.no_grad(), FirstOfEquals():
            (y,) = evaluate(program.graph, [x], program.weights)
            torch.testing.assert_close(y, module(x), atol=1e-4, rtol=1e-5)
