"""Small modules for captures, each with one common coding habit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WIDTH, EXPERTS = 8, 4


class Moe(nn.Module):
    """Top-2 of four linear experts, every expert over every row."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False, dtype=dtype)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y = y + (weights * (chosen == i)).sum(-1, keepdim=True) * expert(x)
        return y


class Two(nn.Module):
    """Two inputs, of the same sizes."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * 2 + y


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids))


class Counts(nn.Module):
    """Adds its previous inputs: a buffer, written in place."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.full((WIDTH,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x.sum(0))
        return x + self.total


class Cached(nn.Module):
    """Keys written at a position, by slice assignment, into a cache that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = [torch.zeros(6, WIDTH)]
        self.register_buffer("keys", self.cache[0], persistent=False)

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        (keys,) = self.cache
        keys.index_copy_(0, at, x)
        return x @ self.keys.T


class Shifts(nn.Module):
    """A window of the last rows, moved by slice assignment."""

    window: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.zeros(3, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.window.clone()
        self.window[:2] = before[1:]
        self.window[2:] = x
        return self.window.sum(0)


class Function(nn.Module):
    """Whatever a function does."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, *rest: Any) -> Any:
        return self.function(x, *rest)
