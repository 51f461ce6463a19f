"""Plain modules with MoE layers, as written for torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Masked(nn.Module):
    """Every expert computes every token, and a mask drops unchosen results. x[B, S, D]."""

    def __init__(self, width: int = 16, hidden: int = 32, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.gate = nn.Parameter(torch.randn(experts, hidden, width) * 0.2)
        self.up = nn.Parameter(torch.randn(experts, hidden, width) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        weights, chosen = F.softmax(self.router(rows), -1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(rows)
        for expert in range(len(self.gate)):
            share = ((chosen == expert).to(weights.dtype) * weights).sum(-1, keepdim=True)
            hidden = F.silu(rows @ self.gate[expert].T) * (rows @ self.up[expert].T)
            y += hidden @ self.down[expert].T * share
        return x + y.view(x.shape)


class Gathered(nn.Module):
    """Each token brings the weights of its experts. x[T, D]."""

    def __init__(self, width: int = 16, hidden: int = 32, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, width) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).topk(2, -1)
        hidden = F.gelu(torch.einsum("tkhd,td->tkh", self.up[chosen], x))
        y = torch.einsum("tkdh,tkh->tkd", self.down[chosen], hidden)
        return (y * weights.softmax(-1).unsqueeze(-1)).sum(1)


class Listed(nn.Module):
    """Experts in a ModuleList, each a module of its own. x[T, D]."""

    def __init__(self, width: int = 16, hidden: int = 32, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            share = torch.where(chosen == index, weights, 0).sum(-1, keepdim=True)
            y = y + expert(x) * share
        return y


class Model(nn.Module):
    """Two layers of the same shape, so that one can take the other's code. x[B, S, D]."""

    def __init__(self, layer: type[nn.Module] = Masked) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.layers = nn.ModuleList([layer(), layer()])
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(self.norm(x))
        return self.head(x)
