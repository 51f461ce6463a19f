"""A layer with a router and four experts, whose `form` each test replaces."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

D, H, E, K = 8, 12, 4, 2
Form = Callable[["Layer", Tensor], Any]


class Layer(nn.Module):
    """A router and four experts, as submodules and as stacked matrices, run by `form`."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, H), nn.SiLU(), nn.Linear(H, D)) for _ in range(E)
        )
        self.w1 = nn.Parameter(torch.randn(E, D, H) * 0.3)
        self.w2 = nn.Parameter(torch.randn(E, H, D) * 0.3)
        self.norm = nn.BatchNorm1d(D)
        self.form = form

    def choose(self, flat: Tensor, k: int = K) -> tuple[Tensor, Tensor]:
        weights, ids = self.gate(flat).softmax(-1).topk(k, -1)
        return weights / weights.sum(-1, keepdim=True), ids

    def dense(self, flat: Tensor) -> Tensor:
        weights, ids = self.choose(flat)
        full = torch.zeros(flat.shape[0], E).scatter(1, ids, weights)
        return sum((full[:, i, None] * e(flat) for i, e in enumerate(self.experts)), start=0 * flat)

    def forward(self, x: Tensor) -> Any:
        return self.form(self, x)


def forms_of(module: ModuleType) -> dict[str, Form]:
    """By what their names say: the functions that a file defines for others."""
    functions = inspect.getmembers(module, inspect.isfunction)
    forms = [f for name, f in functions if f.__module__ == module.__name__ and name[0] != "_"]
    return {form.__name__.replace("_", " "): form for form in forms}
