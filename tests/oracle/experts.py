"""Small MoE layers as people write them, in parts: how experts are chosen, how they are computed.

A layer inherits one of each and says what its second input does.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, H, E, K, P = 8, 12, 4, 2, 64
"""Width, hidden width, experts, experts of a token, and the rows of a table of positions."""


class Routed(nn.Module):
    """`example` has the sizes B and S of the example. `general`: every size must compile,
    because no branch depends on sizes, or one whose sides are equal."""

    example: ClassVar[tuple[int, int]] = (2, 6)
    general: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.table = nn.Embedding(P, D)
        self.biases = nn.Parameter(torch.randn(3, E))
        self.build()

    def build(self) -> None:
        """Adds the weights of the experts."""

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """f[T, K], i64[T, K] of f[T, E]."""
        weights, experts = logits.softmax(-1).topk(K, -1)
        return weights / weights.sum(-1, keepdim=True), experts

    def mix(self, h: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        raise NotImplementedError

    def moe(self, x: Tensor, logits: Tensor | None = None) -> Tensor:
        h = x.reshape(-1, D)
        chosen = self.choose((self.router(h) if logits is None else logits).reshape(-1, E))
        return self.mix(h, *chosen).view(x.shape)


class Sigmoid(Routed):
    """Scores between 0 and 1, of which a bias changes the order only."""

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        experts = torch.topk(scores + self.biases[0], K, dim=-1, sorted=False).indices
        weights = scores.gather(1, experts)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 1.5, experts


class Chosen(Routed):
    """A softmax of the greatest logits."""

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        values, experts = torch.topk(logits, K, dim=-1)
        return F.softmax(values, dim=-1), experts


class Switch(Routed):
    """One expert a token, times its probability."""

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts = F.softmax(logits, dim=-1).max(dim=-1, keepdim=True)
        return weights, experts


class Loop(Routed):
    """Rows of each expert, in a loop over modules."""

    def build(self) -> None:
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)) for _ in range(E)
        )

    def mix(self, h: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        y = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            rows, column = torch.where(experts == e)
            y.index_add_(0, rows, expert(h[rows]) * weights[rows, column, None])
        return y


class Glu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (
            nn.Linear(a, b, bias=False) for a, b in ((D, H), (H, D), (D, H))
        )

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(h)) * self.w3(h))
        return out


class OneHot(Routed):
    """As Mixtral: a mask of experts, permuted."""

    def build(self) -> None:
        self.experts = nn.ModuleList(Glu() for _ in range(E))

    def mix(self, h: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        y = torch.zeros(h.shape, dtype=h.dtype)
        mask = F.one_hot(experts, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            column, rows = torch.where(mask[e])
            y.index_add_(0, rows, self.experts[e](h[rows]) * weights[rows, column, None])
        return y


class Dense(Routed):
    """All tokens in all modules, times weights of which most are zero."""

    def build(self) -> None:
        self.experts = nn.ModuleList(Glu() for _ in range(E))

    def mix(self, h: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        full = torch.zeros(h.shape[0], E).scatter(1, experts, weights)
        return sum((full[:, e : e + 1] * f(h) for e, f in enumerate(self.experts)), h * 0)


class Stacked(Routed):
    def build(self) -> None:
        self.up = nn.Parameter(torch.randn(E, D, H) * D**-0.5)
        self.down = nn.Parameter(torch.randn(E, H, D) * H**-0.5)


class Bmm(Stacked):
    """All tokens, as many copies as experts, in two batched products."""

    def mix(self, h: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        full = torch.zeros(h.shape[0], E).scatter_(1, experts, weights)
        out = torch.bmm(F.relu(torch.bmm(h.expand(E, -1, D), self.up)), self.down)
        return (out * full.t()[..., None]).sum(0)


class Gathered(Stacked):
    """The weights of each token's experts."""

    def mix(self, h: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("td,tkdh->tkh", h, self.up[experts]))
        return torch.einsum("tkh,tkhd,tk->td", hidden, self.down[experts], weights)


class Einsum(Stacked):
    """As T5X: dispatch by a product with weights of tokens and experts."""

    def mix(self, h: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        full = (F.one_hot(experts, E) * weights[..., None]).sum(1)
        hidden = torch.einsum("td,edh->eth", h, self.up).relu()
        return torch.einsum("eth,ehd,te->td", hidden, self.down, full)


class Shared(Routed):
    """Adds an expert of all tokens; it precedes the way of its experts in the list of bases."""

    def build(self) -> None:
        super().build()
        self.shared, self.shared_gate = Glu(), nn.Linear(D, 1, bias=False)

    def mix(self, h: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        both: Tensor = super().mix(h, weights, experts) + self.shared(h)
        return both


def layers(module: dict[str, Any]) -> dict[str, type[Routed]]:
    """The layers that the file with these variables defines."""
    return {
        name: value
        for name, value in module.items()
        if isinstance(value, type) and value.__module__ == module["__name__"]
    }
