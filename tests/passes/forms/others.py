"""Layers that look like MoE and are no block, or none that moe.* can say: x[T, D] -> y[T, D]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.forms.experts import Mlp
from tests.passes.forms.loops import Loop, RowsLoop
from tests.passes.forms.sizes import E
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
