"""Choices of tokens, heads and queries: x[T, D] -> y[T, D]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.forms.experts import Mlp
from tests.passes.forms.loops import Loop
from tests.passes.forms.sizes import D, E, H


class ChosenTokens(Loop):
    """Experts choose their tokens, and give their results side by side."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router.gate(x).softmax(-1).t()
        shares, rows = scores.topk(max(1, len(x) // 2), dim=-1)
        y = self.results(x[rows]) * shares[..., None]
        return torch.zeros_like(x).index_add(0, rows.flatten(), y.reshape(-1, D))

    def results(self, rows: Tensor) -> Tensor:
        return torch.stack([e(part) for e, part in zip(self.experts, rows, strict=True)])


class StackedTokens(ChosenTokens):
    """With the experts' weights in stacks, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.bias = nn.Parameter(torch.randn(E, D, H)), nn.Parameter(torch.randn(E, H))
        self.down = nn.Parameter(torch.randn(E, H, D))

    def results(self, rows: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("esd,edh->esh", rows, self.up) + self.bias[:, None])
        return torch.einsum("esh,ehd->esd", hidden, self.down)


class TableOfTokens(Loop):
    """A table of tokens for the slots of experts; a row of zeros is behind tokens and results, for
    empty slots and dropped tokens."""

    slots = 4

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router.gate(x).softmax(-1).max(-1)
        hot = F.one_hot(chosen, E)
        slot = (hot.cumsum(0) - 1).gather(1, chosen[:, None])[:, 0]
        last = torch.full_like(slot, E * self.slots)
        target = torch.where(slot < self.slots, chosen * self.slots + slot, last)
        table = last.new_full((E * self.slots + 1,), len(x)).scatter(
            0, target, torch.arange(len(x))
        )
        rows = torch.cat([x, x.new_zeros(1, D)]).index_select(0, table[:-1])
        parts = rows.view(E, self.slots, D)
        y = torch.stack([e(part) for e, part in zip(self.experts, parts, strict=True)])
        y = torch.cat([y.view(-1, D), y.new_zeros(1, D)])
        return y.index_select(0, target) * share[:, None]


class OneProduct(StackedTokens):
    """As heads of attention have: no network."""

    def results(self, rows: Tensor) -> Tensor:
        return torch.einsum("esd,edh->esh", rows, self.up)[..., :D]


class MaskedHeads(nn.Module):
    """Heads of attention that a router masks."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.qkv, self.out = nn.Linear(D, E), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)
        mask = F.one_hot(shares.topk(2, dim=-1)[1], E).sum(1)
        q, k, v = self.qkv(x).reshape(-1, 3, E, D // E).permute(1, 2, 0, 3).unbind(0)
        heads = ((q @ k.mT).softmax(-1) @ v).transpose(0, 1)
        return self.out((heads * (shares * mask)[..., None]).flatten(1))


class ChosenRows(nn.Module):
    """One network, which the best tokens go through."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.network = nn.Linear(D, 1), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        shares, rows = self.gate(x)[:, 0].topk(max(1, len(x) // 2))
        return x.index_add(0, rows, self.network(x[rows]) * shares.sigmoid()[:, None])


class AttentionExperts(nn.Module):
    """Queries and results of chosen heads; keys and values are those of all."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.gate, self.kv = nn.Linear(D, E), nn.Linear(D, 2 * width)
        self.q, self.o = (
            nn.Parameter(torch.randn(E, D, width)),
            nn.Parameter(torch.randn(E, width, D)),
        )

    def forward(self, x: Tensor) -> Tensor:
        shares, ids = self.gate(x).softmax(-1).topk(2, -1)
        q = torch.einsum("nd,nkdw->nkw", x, self.q[ids])
        key, value = self.kv(x).chunk(2, -1)
        attention = torch.einsum("nkw,mw->knm", q, key).softmax(-1)
        y = torch.einsum("knm,mw->nkw", attention, value)
        return torch.einsum("nkw,nkwd,nk->nd", y, self.o[ids], shares)


class ChosenHeads(AttentionExperts):
    """The same, with the weights after the output projection, as Mod-Squad writes it."""

    def forward(self, x: Tensor) -> Tensor:
        shares, ids = self.gate(x).softmax(-1).topk(2, -1)
        q = torch.einsum("nd,nkdw->nkw", x, self.q[ids]).transpose(0, 1)[None]
        key, value = (part.expand(1, 2, -1, -1) for part in self.kv(x).chunk(2, -1))
        heads = F.scaled_dot_product_attention(q, key, value)[0].transpose(0, 1)
        y = torch.einsum("nkw,nkwd->nkd", heads, self.o[ids])
        return (y * shares[..., None]).sum(1)
