"""Low-rank experts beside a linear layer, x[T, D] -> y[T, D]: LoRAMoE (Dou et al. 2023, arXiv
2312.09979), MoLE (Wu et al. 2024, arXiv 2404.13628), HydraLoRA (Tian et al. 2024, arXiv
2404.19245) and MixLoRA (Li et al. 2024, arXiv 2404.15159)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.passes.forms.sizes import D, E

RANK = 3
SCALE = 2.0


class LowRank(nn.Module):
    """A loop over the pairs that starts from the linear layer's result; all are weighed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gate = nn.Linear(D, D), nn.Linear(D, E, bias=False)
        self.down = nn.ModuleList(nn.Linear(D, RANK, bias=False) for _ in range(E))
        self.up = nn.ModuleList(nn.Linear(RANK, D, bias=False) for _ in range(E))

    def shares(self, x: Tensor) -> Tensor:
        return self.gate(x).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        shares, y = self.shares(x), self.linear(x)
        for number, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            y = y + shares[:, number, None] * up(down(x)) * SCALE
        return y


class ScaledFirst(LowRank):
    """Each pair is scaled before it is weighed, and the last layer's result is added at the end."""

    def forward(self, x: Tensor) -> Tensor:
        shares = self.shares(x)
        pairs = zip(shares.unbind(-1), self.down, self.up, strict=True)
        return self.linear(x) + sum(w[:, None] * (SCALE * up(down(x))) for w, down, up in pairs)


class ScaledShares(LowRank):
    """The weights are scaled, each by its own number."""

    def forward(self, x: Tensor) -> Tensor:
        shares, y = self.shares(x), self.linear(x)
        for number, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            y = y + shares[:, number, None] * up(down(x)) * (number + 1.0)
        return y


class Stacked(LowRank):
    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.down, self.up, strict=True)
        results = torch.stack([up(down(x)) for down, up in pairs], -2)
        return self.linear(x) + torch.einsum("te,ted->td", self.shares(x), results) * SCALE


class WeighedInside(LowRank):
    """The weights multiply what lies between both matrices of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = (nn.Parameter(torch.randn(E, *s)) for s in ((D, RANK), (RANK, D)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("td,edr->ter", x, self.inner) * self.shares(x)[..., None]
        return self.linear(x) + torch.einsum("ter,erd->td", hidden, self.outer) * SCALE


class OneDown(LowRank):
    """HydraLoRA: one matrix down, several up."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.down[0](x)
        results = torch.stack([up(hidden) for up in self.up])
        return self.linear(x) + (self.shares(x).t()[..., None] * results).sum(0)


class Chosen(LowRank):
    """Two pairs of each token, in a loop over the rows of each pair."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.shares(x).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for number, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            rows, slot = torch.where(chosen == number)
            y.index_add_(0, rows, up(down(x[rows])) * weights[rows, slot, None])
        return self.linear(x) + y * SCALE


class OneAfterTheOther(LowRank):
    """Each pair reads the sum so far."""

    def forward(self, x: Tensor) -> Tensor:
        shares, y = self.shares(x), self.linear(x)
        for number, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            y = y + shares[:, number, None] * up(down(y)) * SCALE
        return y


class Unlike(LowRank):
    """One of the pairs has a rank of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.down[1], self.up[1] = nn.Linear(D, 5, bias=False), nn.Linear(5, D, bias=False)
