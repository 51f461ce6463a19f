"""A router that chooses by logits is not one that chooses by their sigmoids: above logits of 17 all
sigmoids are 1 in float32, and experts with different logits are tied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.interpret.evaluate import evaluate

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
