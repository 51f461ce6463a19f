"""MoE layers that torch.export refuses, in the style of research code."""

from __future__ import annotations

import torch
from torch import nn

WIDTH, HIDDEN, EXPERTS, TOP_K = 16, 24, 4, 2


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, WIDTH))


class Layer(nn.Module):
    """A gate, a list of experts, and a softmax over the best two."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))

    def choose(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = self.gate(flat).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), ids


class CountsInNumpy(Layer):
    """DiT-like: counts are read into numpy, and rows are sorted."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1, WIDTH)
        weights, ids = self.choose(flat)
        order = ids.view(-1).argsort()
        ends = ids.view(-1).bincount().cpu().numpy().cumsum(0)
        out, start = torch.zeros_like(flat), 0
        for i, end in enumerate(ends):
            if end > start:
                chosen = order[start:end]
                y = self.experts[i](flat[chosen // TOP_K]) * weights.view(-1, 1)[chosen]
                out.index_add_(0, chosen // TOP_K, y)
            start = end
        return out.view_as(x)


class ExpertChoice(nn.Module):
    """Experts choose their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        top, tokens = self.gate(flat).softmax(-1).topk(max(1, len(flat) // EXPERTS), 0)
        out = torch.zeros_like(flat)
        for i in range(EXPERTS):
            rows = tokens[:, i].tolist()
            out[rows] += self.experts[i](flat[rows]) * top[:, i, None]
        return out.view_as(x)
