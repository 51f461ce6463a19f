"""A model of three blocks, of which one is declined: its experts look at each other's rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, HIDDEN, EXPERTS = 16, 32, 4


class Routed(nn.Module):
    """Top-2 of four experts; each gets the rows that chose it, and if `centred` subtracts
    their mean: then a row depends on the others."""

    def __init__(self, centred: bool = False) -> None:
        super().__init__()
        self.centred = centred
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
            for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            rows = expert(x[token])
            if self.centred:
                rows = rows - rows.mean(0, keepdim=True)
            y = y.index_add(0, token, rows * weights[token, slot, None])
        return y


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Routed(), Routed(centred=True), Routed()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def stack() -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    return Stack().eval(), (torch.randn(8, WIDTH),)
