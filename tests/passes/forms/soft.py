"""Mixtures over slots as people write them, and modules that only look like one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, H, E, P = 6, 10, 3, 2


class Soft(nn.Module):
    """The paper's layer: phi [D, E, P], normalised and scaled; a list of experts."""

    def __init__(self, experts: int = E, slots: int = P) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.randn(D, experts, slots))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)) for _ in range(experts)
        )

    def logits(self, x: Tensor) -> Tensor:
        phi = self.scale * F.normalize(self.phi, dim=0)
        return torch.einsum("bsd,dep->bsep", F.normalize(x, dim=-1), phi)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)
        return logits.softmax(1), logits.flatten(2).softmax(-1).view_as(logits)

    def run(self, slots: Tensor) -> Tensor:
        return torch.stack([f(slots[:, e]) for e, f in enumerate(self.experts)], 1)

    def forward(self, x: Tensor) -> Any:
        dispatch, combine = self.weights(x)
        outs = self.run(torch.einsum("bsd,bsep->bepd", x, dispatch))
        return torch.einsum("bepd,bsep->bsd", outs, combine)


class WrittenOut(Soft):
    """The softmax over experts and slots is written out; results are concatenated."""

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)

        def softmax(dims: tuple[int, ...]) -> Tensor:
            power = (logits - logits.amax(dims, keepdim=True)).exp()
            return power / power.sum(dims, keepdim=True)

        return softmax((1,)), softmax((2, 3))

    def run(self, slots: Tensor) -> Tensor:
        parts = slots.flatten(1, 2).chunk(len(self.experts), 1)
        return torch.cat([f(p) for f, p in zip(self.experts, parts, strict=True)], 1).view_as(slots)


class Stacked(Soft):
    """Stacks of weights, by einsums, and gated."""

    def __init__(self, experts: int = E, slots: int = P) -> None:
        super().__init__(experts, slots)
        self.up = nn.Parameter(torch.randn(experts, D, 2 * H) * 0.4)
        self.bias = nn.Parameter(torch.randn(experts, 2 * H) * 0.4)
        self.down = nn.Parameter(torch.randn(experts, H, D) * 0.4)

    def run(self, slots: Tensor) -> Tensor:
        both = torch.einsum("bepd,edh->beph", slots, self.up) + self.bias[:, None]
        gate, up = both.chunk(2, -1)
        return torch.einsum("beph,ehd->bepd", F.silu(gate) * up, self.down)


class ExpertsFirst(Soft):
    """Slots go to the experts as [E, B, P, D], in a batched product."""

    def __init__(self, experts: int = E, slots: int = P) -> None:
        super().__init__(experts, slots)
        self.up = nn.Parameter(torch.randn(experts, D, D) * 0.4)

    def run(self, slots: Tensor) -> Tensor:
        rows = slots.transpose(0, 1).flatten(1, 2)
        outs = F.relu(torch.bmm(rows, self.up))
        return outs.view(slots.shape[1], slots.shape[0], -1, D).transpose(0, 1)


class SlotMajor(Soft):
    """phi [D, P, E]: the slots of an expert are not consecutive."""

    def forward(self, x: Tensor) -> Any:
        logits = x @ self.phi.transpose(1, 2).flatten(1)
        slots = logits.softmax(1).mT @ x
        rows = slots.view(x.shape[0], -1, len(self.experts), D)
        outs = torch.stack([f(rows[:, :, e]) for e, f in enumerate(self.experts)], 2)
        return logits.softmax(-1) @ outs.flatten(1, 2)


class OneText(Soft):
    """Tokens [S, D], without an axis of texts."""

    def forward(self, x: Tensor) -> Any:
        logits = x.flatten(0, 1) @ self.phi.flatten(1)
        slots = logits.softmax(0).T @ x.flatten(0, 1)
        parts = [f(p) for f, p in zip(self.experts, slots.chunk(len(self.experts)), strict=True)]
        return (logits.softmax(1) @ torch.cat(parts)).view_as(x)


class TwoPhis(Soft):
    """Another phi for the combine: refined, the node takes two logits."""

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ self.phi.flatten(1).roll(1, 0)
        return super().weights(x)[0], logits.softmax(-1).view(*x.shape[:2], *self.phi.shape[1:])


class Masked(Soft):
    """Some tokens add nothing to the slots: the mask is before the node."""

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)
        away = (x[..., :1, None] > 0.5) & (torch.arange(x.shape[1]) > 0)[:, None, None]
        return logits.masked_fill(away, -1e9).softmax(1), super().weights(x)[1]


class Looped(Soft):
    """A loop over the experts adds what each gives."""

    def forward(self, x: Tensor) -> Any:
        dispatch, combine = self.weights(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            slots = torch.einsum("bsd,bsp->bpd", self.tokens(x, e), dispatch[:, :, e])
            y = y + torch.einsum("bpd,bsp->bsd", expert(slots), combine[:, :, self.other(e)])
        return y

    def tokens(self, x: Tensor, expert: int) -> Tensor:
        return x

    def other(self, expert: int) -> int:
        return expert


class LoopedParts(Soft):
    """The weights of an expert are a part of the last axis, the last expert's first."""

    def forward(self, x: Tensor) -> Any:
        logits = x @ self.phi.flatten(1)
        dispatch, combine = logits.softmax(1), logits.softmax(-1)
        parts = []
        for e in reversed(range(E)):
            part = slice(e * P, (e + 1) * P)
            parts.append(combine[..., part] @ self.experts[e](dispatch[..., part].mT @ x))
        return sum(parts)


class LoopedToOthers(Looped):
    """What an expert gives goes where the weights of another say."""

    def other(self, expert: int) -> int:
        return (expert + 1) % E


class LoopedOverOthers(Looped):
    """The last expert reads other tokens."""

    def tokens(self, x: Tensor, expert: int) -> Tensor:
        return x * 2 if expert == E - 1 else x


class SlotsFirst(Soft):
    """The dispatch is a softmax over the slots."""

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        combine = super().weights(x)[1]
        return combine, combine


class ByExpert(Soft):
    """The combine is a softmax over the slots of each expert."""

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().weights(x)[0], self.logits(x).softmax(-1)


class MaskedAfter(Soft):
    """The weights of some tokens are zero, and the others do not sum to one."""

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dispatch, combine = super().weights(x)
        return dispatch * (x[..., :1, None] > 0).float(), combine


class Renormalised(Soft):
    """Dispatch weights are divided by their sum over the slots."""

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dispatch, combine = super().weights(x)
        return dispatch / dispatch.sum((2, 3), keepdim=True), combine


class OtherKinds(Soft):
    """One of the experts is of another kind."""

    def __init__(self, experts: int = E, slots: int = P) -> None:
        super().__init__(experts, slots)
        self.experts[1] = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))


class Mixed(Soft):
    """The slots of an expert act on one another."""

    def run(self, slots: Tensor) -> Tensor:
        return super().run(slots - slots.mean(2, keepdim=True))


class ReadsTokens(Soft):
    """What the experts give is scaled by the tokens' mean."""

    def forward(self, x: Tensor) -> Any:
        dispatch, combine = self.weights(x)
        outs = self.run(torch.einsum("bsd,bsep->bepd", x, dispatch))
        outs = outs * x.mean(1)[:, None, None]
        return torch.einsum("bepd,bsep->bsd", outs, combine)


class Uneven(Soft):
    """The last expert has one slot, the others have three."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.randn(D, 7, 1))

    def run(self, slots: Tensor) -> Tensor:
        parts = slots.flatten(1, 2).chunk(E, 1)
        return torch.cat([f(p) for f, p in zip(self.experts, parts, strict=True)], 1).view_as(slots)


class OneReadsTokens(Soft):
    """The one expert reads the tokens' mean beside its slots."""

    def __init__(self) -> None:
        super().__init__(1, P)

    def forward(self, x: Tensor) -> Any:
        dispatch, combine = self.weights(x)
        slots = torch.einsum("bsd,bsep->bepd", x, dispatch)
        outs = self.experts[0](slots.flatten(1, 2) + x.mean(1, keepdim=True))
        return torch.einsum("bepd,bsep->bsd", outs.view_as(slots), combine)


class Attention(nn.Module):
    """Two layers of attention over learned keys, one behind the other: no experts of slots."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.layer = nn.Parameter(torch.randn(2, 4, D)), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Any:
        pooled = (self.keys[0] @ x.mT).softmax(-1) @ x
        pooled = self.layer(pooled)
        return (pooled @ pooled.mT).softmax(-1) @ pooled
