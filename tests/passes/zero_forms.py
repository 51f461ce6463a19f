"""MoE++ layers (arXiv 2410.07348) in common forms; outputs are (y, logits)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

D, H = 8, 16


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, H, bias=False), nn.Linear(D, H, bias=False)
        self.down = nn.Linear(H, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Copy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(D, 2, bias=False)
        self.vector = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.mix(x).softmax(-1)
        return alpha[:, :1] * x + alpha[:, 1:] * self.vector


class Layer(nn.Module):
    """Every expert over the rows that chose it, as the layer of a model would."""

    renormalised = False
    order: tuple[type[nn.Module], ...] = (Copy, Constant, Constant, Zero)

    def __init__(self, networks: int = 4, k: int = 2) -> None:
        super().__init__()
        self.k = k
        self.experts = nn.ModuleList(
            [*(Mlp() for _ in range(networks)), *(kind() for kind in self.order)]
        )
        count = len(self.experts)
        self.router = nn.Linear(D, count, bias=False)
        self.residual = nn.Linear(count, count, bias=False)

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits = self.router(x)
        if before is not None:
            logits = logits + self.residual(before)
        weights, ids = logits.softmax(-1).topk(self.k, dim=-1)
        if self.renormalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return self.mixed(x, weights, ids), logits

    def mixed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if isinstance(expert, Zero):
                continue
            tokens, slots = torch.where(ids == number)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out


class Dense(Layer):
    """Every expert over every token, the weight zero where it was not chosen."""

    renormalised = True
    order = (Constant, Constant, Copy, Zero)

    def mixed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts[:-1]):
            share = (weights * (ids == number)).sum(-1, keepdim=True)
            out = out + share * expert(x)
        return out


class Evaluated(Layer):
    """The zero expert is called as the others are, and is not the last."""

    order = (Constant, Zero, Constant, Copy)

    def mixed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == number)
            out.index_add_(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return out


class OnlyZero(Dense):
    order = (Zero,)


class Stack(nn.Module):
    """Three layers; the logits of each go into the next one's (gating residuals)."""

    def __init__(self, kind: type[Layer] = Layer, **options: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(**options) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor | None = None
        for layer in self.layers:
            y, logits = layer(x, logits)
            x = x + y
        return x
