"""Routers in common forms.

logits [T, E] -> weights [T, k], experts [T, k]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.forms.sizes import D, E, K


def softmax_topk(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = logits.softmax(-1).topk(K, -1)
    return weights, experts


def softmax_topk_renormalised(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = F.softmax(logits, dim=-1, dtype=torch.float32).topk(K, -1)
    return (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), experts


def topk_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = torch.topk(logits, K, dim=-1)
    return weights.softmax(-1), experts


def sorted_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same choice by a full sort."""
    weights, experts = torch.sort(logits, dim=-1, descending=True)
    return weights[:, :K].softmax(-1), experts[:, :K]


def topk_sigmoid(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = torch.topk(logits, K, dim=-1)
    return weights.sigmoid(), experts


def sigmoid_scaled(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = logits.sigmoid().topk(K, -1)
    return weights / (weights.sum(-1, keepdim=True) + 1e-6) * 2.5, experts


def softmax_norm(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Renormalised by the 1-norm, as DBRX does."""
    weights, experts = logits.softmax(-1).topk(K, -1)
    return weights / torch.linalg.vector_norm(weights, ord=1, dim=-1, keepdim=True), experts


def switch(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = logits.softmax(-1).max(-1, keepdim=True)
    return weights, experts


def argmax_only(logits: Tensor) -> tuple[Tensor, Tensor]:
    experts = logits.argmax(-1, keepdim=True)
    return torch.ones_like(experts, dtype=logits.dtype), experts


def worst(logits: Tensor) -> tuple[Tensor, Tensor]:
    """No `Routing`: the experts of the least probabilities."""
    scores = logits.softmax(-1)
    experts = scores.argsort(-1)[:, :K]
    return scores.gather(1, experts), experts


def tempered(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The weights are square roots of probabilities."""
    weights, experts = logits.softmax(-1).topk(K, -1)
    return weights.sqrt(), experts


def sparsemixer(logits: Tensor, jitter: float = 0.05) -> tuple[Tensor, Tensor]:
    """PhiMoE's sampler at inference."""
    left, weights, experts = logits, [], []
    for _ in range(2):
        top, chosen = left.max(-1, keepdim=True)
        factor = logits.abs().clamp(min=top)
        far = (top - logits) / factor > 2 * jitter
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, chosen))
        experts.append(chosen)
        left = left.scatter(-1, chosen, -torch.inf)
    return torch.cat(weights, -1), torch.cat(experts, -1)


class Router(nn.Module):
    def __init__(self, rule: Callable[[Tensor], tuple[Tensor, Tensor]], experts: int = E) -> None:
        super().__init__()
        self.rule = rule
        self.gate = nn.Linear(D, experts, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.rule(self.gate(x))


class Grouped(nn.Module):
    """DeepSeek: V3 scores groups by their best two and corrects the choice, V2 by their best."""

    def __init__(
        self, version: int, experts: int = 8, groups: int = 4, count: int = 2, k: int = 3
    ) -> None:
        super().__init__()
        self.version, self.groups, self.kept, self.k = version, groups, count, k
        self.gate = nn.Linear(D, experts, bias=False)
        self.correction = nn.Parameter(torch.randn(experts) * 0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, size = self.gate(x), self.gate.out_features // self.groups
        if self.version == 3:
            scores = logits.sigmoid()
            choice = scores + self.correction
            groups = choice.view(-1, self.groups, size).topk(2, dim=-1)[0].sum(-1)
        else:
            choice = scores = logits.softmax(-1)
            groups = choice.view(-1, self.groups, size).max(-1).values
        best = groups.topk(self.kept, sorted=False)[1]
        selected = torch.zeros_like(groups).scatter_(1, best, 1).unsqueeze(-1)
        mask = selected.expand(-1, -1, size).reshape(-1, self.groups * size)
        choice = choice.masked_fill(~mask.bool(), float("-inf") if self.version == 3 else 0.0)
        experts = choice.topk(self.k, sorted=False)[1]
        weights = scores.gather(1, experts)
        if self.version == 3:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * 1.5, experts
