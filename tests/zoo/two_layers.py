"""Two layers of experts in a loop, of which the second counts more."""

from __future__ import annotations

import torch

EXPERTS, WIDTH, K = 4, 64, 2


class Experts(torch.nn.Module):
    k = K

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(WIDTH, EXPERTS, bias=False)
        self.w = torch.nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(self.k)
        y = torch.zeros_like(x)
        for e in range(len(self.w)):
            y = y + (weights * (chosen == e)).sum(-1, keepdim=True) * self.expert(e, x)
        return y

    def expert(self, e: int, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.w[e])


class Net(torch.nn.Module):
    """Two layers: the result has a hundred times as much of the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Experts(), Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + 100 * self.second(x)
