"""Ranks of tokens, of which there may be more than experts, are no expert ids."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import moec
from moec.ir.interpret.evaluate import evaluate


class OrderedByScore(nn.Module):
    """A capacity that the tokens of largest weights fill: ranks by two sorts along the tokens, and
    all experts on the input side."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.w1 = nn.Parameter(torch.randn(4, 8, 6) * 0.3)
        self.w2 = nn.Parameter(torch.randn(4, 6, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[0]
        probs = self.gate(x).softmax(-1)
        weights, ids = probs.topk(1, dim=-1)
        held = torch.zeros_like(probs).scatter(1, ids, weights)
        ranks = held.argsort(dim=0, descending=True, stable=True).argsort(dim=0).gather(1, ids)
        weights = torch.where(ranks < math.ceil(tokens / 4), weights, 0.0)
        full = x.new_zeros(tokens, 4).scatter(1, ids, weights)
        rows = (x.repeat(4, 1) * full.t().reshape(-1, 1)).view(4, -1, 8)
        return torch.bmm(torch.bmm(rows, self.w1).relu(), self.w2).sum(0)


def test_ranks_along_the_tokens_are_no_expert_ids() -> None:
    torch.manual_seed(0)
    module = OrderedByScore().eval()
    compiled = moec.compile(module, (torch.randn(12, 8),), build=False, verify=False)
    program = compiled.pass_results[-1].program
    for tokens in (1, 3, 4, 5, 12, 40):
        x = torch.randn(tokens, 8)
        (result,) = evaluate(program.graph, (x,), program.weights)
        torch.testing.assert_close(result, module(x), rtol=1e-4, atol=1e-5)
