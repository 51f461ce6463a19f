"""torch.compile with moec's kernels: inference at any length, then a few steps of training.

The model is ordinary PyTorch. Its MoE block becomes one call of moec. `rest` selects what runs the
other ops: here plain PyTorch ("inductor", the default, needs a C++ compiler).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec
import moec.dynamo  # only in a checkout; if moec is installed, torch finds the backend


class Layer(nn.Module):
    """Eight experts, two per token. x[T, D] -> [T, D]."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x)
        weights, chosen = F.softmax(self.router(rows), dim=-1).topk(2, dim=-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            share = torch.where(chosen == index, weights, 0).sum(-1, keepdim=True)
            y = y + expert(rows) * share
        return x + y


torch.manual_seed(0)
model = nn.Sequential(Layer(32, 64, experts=8), Layer(32, 64, experts=8))
compiled = torch.compile(model, backend="moec", dynamic=True, options={"rest": "eager"})

with torch.no_grad():
    for tokens in (3, 17, 200):
        x = torch.randn(tokens, 32)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
print("inference:", moec.stats(reset=True))

optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
x = torch.randn(64, 32)
for _ in range(10):
    loss = F.mse_loss(compiled(x), x.roll(1, dims=1))
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    print(f"loss {loss.item():.4f}")
print("training:", moec.stats())
