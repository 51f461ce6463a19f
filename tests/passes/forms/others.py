"""Layers that look like MoE but are no block, or none that moe.* supports: x[T, D] -> y[T, D]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.forms.experts import Mlp
from tests.passes.forms.loops import Loop, RowsLoop
from tests.passes.forms.sizes import D, E
from tests.passes.forms.stacks import Gathered, Stacks


class SoftMixture(Stacks):
    """Every token uses every expert."""

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router.gate(x).softmax(-1)
        hidden = F.gelu(torch.einsum("td,ehd->teh", x, self.up) + self.bias)
        return (torch.einsum("teh,edh->ted", hidden, self.down) * shares[..., None]).sum(1)


class SoftLoop(Loop):
    def forward(self, x: Tensor) -> Tensor:
        shares = self.router.gate(x).softmax(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out + shares[:, number, None] * expert(x)
        return out


class TwoLevels(nn.Module):
    """A gate over groups of experts, and in each group one over its members: all are used.
    `sample` gives gates that read a whole sample, x[B, S, D]; `width` is that of the results."""

    def __init__(self, sample: bool = False, width: int = D) -> None:
        super().__init__()
        self.sample = sample
        self.outer = nn.Linear(D, 3)
        self.inner = nn.ModuleList(nn.Linear(D, 2) for _ in range(3))
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Linear(D, width) for _ in range(2)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        read = x.mean(1, keepdim=True) if self.sample else x
        first = self.outer(read).softmax(-1)
        total = torch.zeros(())
        for g, (gate, heads) in enumerate(zip(self.inner, self.heads, strict=True)):
            second = gate(read).softmax(-1)
            part = sum(second[..., i, None] * head(x) for i, head in enumerate(heads))
            total = first[..., g, None] * part if g == 0 else total + first[..., g, None] * part
        return total


class MoreThanUsed(Loop):
    """One expert more is chosen than is used."""

    def forward(self, x: Tensor) -> Tensor:
        top, more = self.router.gate(x).topk(3, dim=1)
        weights, chosen = top[:, :2].softmax(1), more[:, :2]
        shares = torch.zeros(len(x), len(self.experts)).scatter(1, chosen, weights)
        return sum(shares[:, e, None] * expert(x) for e, expert in enumerate(self.experts))


class ProductKeys(nn.Module):
    """The best sums of two scores, each of which has its own keys; an expert is one neuron."""

    def __init__(self, keys: int = 5) -> None:
        super().__init__()
        self.keys = keys
        self.query = nn.Linear(D, 16)
        self.first, self.second = (nn.Parameter(torch.randn(keys, 8)) for _ in range(2))
        self.down, self.up = (nn.Embedding(keys**2, D) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.query(x).chunk(2, -1)
        (v, i), (w, j) = (a @ self.first.t()).topk(2, -1), (b @ self.second.t()).topk(2, -1)
        ids = (i[..., :, None] * self.keys + j[..., None, :]).flatten(-2)
        weights, best = (v[..., :, None] + w[..., None, :]).flatten(-2).topk(2, -1)
        ids = ids.gather(-1, best)
        hidden = F.gelu(torch.einsum("td,tkd->tk", x, self.down(ids))) * weights.softmax(-1)
        return torch.einsum("tk,tkd->td", hidden, self.up(ids))


class Unequal(Loop):
    """One expert has another activation."""

    def __init__(self) -> None:
        super().__init__(Mlp)
        self.experts[2].act = torch.tanh


class Missing(Loop):
    """The loop leaves an expert out."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number in (0, 1, 3):
            share = (weights * (chosen == number)).sum(-1)
            out = out + share[:, None] * self.experts[number](x)
        return out


class Thresholded(Loop):
    """Experts with a small weight are skipped, here and there."""

    threshold = 0.05

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            share = (weights * ((chosen == number) & self.used(weights))).sum(-1)
            out = out + share[:, None] * expert(x)
        return out

    def used(self, weights: Tensor) -> Tensor:
        return weights > self.threshold


class NeverSkipped(Thresholded):
    """Whose weights are never as small."""

    def used(self, weights: Tensor) -> Tensor:
        return weights.exp() > self.threshold


class Limited(Loop):
    """No expert's share is above a limit, which weights of softmax would never reach."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            share = (weights * (chosen == number)).sum(-1)
            out = out + self.bounded(share)[:, None] * expert(x)
        return out

    def bounded(self, share: Tensor) -> Tensor:
        return share.clamp(max=1.5)


class NeverNegative(Limited):
    """Weights of softmax never are."""

    def bounded(self, share: Tensor) -> Tensor:
        return share.abs()


class AcrossTokens(Gathered):
    """The experts see the mean over all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        hidden = torch.einsum("td,tkhd->tkh", x, self.up[chosen])
        hidden = hidden - hidden.mean(0, keepdim=True)
        rows = torch.einsum("tkh,tkdh->tkd", hidden, self.down[chosen])
        return (rows * weights[..., None]).sum(1)


class Copies(RowsLoop):
    """The last two experts are none: their rows come back as they are, weighed."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            rows = expert(x[token]) if number < E - 2 else x[token]
            out.index_add_(0, token, rows * weights[token, slot, None])
        return out


class WrongExpert(RowsLoop):
    """Looks like a loop, but rows are weighed with the weight of the other slot."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            out.index_add_(0, token, expert(x[token]) * weights[token, 1 - slot, None] ** 2)
        return out


class Dense(nn.Module):
    """No experts at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Ensemble(Dense):
    """Branches side by side that nothing weighs or chooses among."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers], 1).sum(1)
