"""Small MoE layers that are loops over experts: x[T, D] -> y[T, D]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.forms.experts import Mlp, SwiGLU
from tests.passes.forms.routers import Router, softmax_topk_renormalised
from tests.passes.forms.sizes import D, E, H


class Loop(nn.Module):
    """Every expert for every token, weighed by what the mask leaves."""

    def __init__(
        self,
        expert: Callable[[], nn.Module] = SwiGLU,
        rule: Callable[[Tensor], tuple[Tensor, Tensor]] = softmax_topk_renormalised,
        router: nn.Module | None = None,
        count: int = E,
    ) -> None:
        super().__init__()
        self.router = router or Router(rule, count)
        self.experts = nn.ModuleList(expert() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            share = (weights * (chosen == number)).sum(-1)
            out = out + share[:, None] * expert(x)
        return out


class Batched3D(Loop):
    """Tokens as [B, S, D] all the way."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out + expert(x) * (weights * (chosen == number)).sum(-1, keepdim=True)
        return out


class PositiveShares(Loop):
    """Results only where the share of an expert is positive."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            share = (weights * (chosen == number)).sum(-1, keepdim=True)
            out = out + torch.where(share > 0, expert(x) * share, 0.0)
        return out


class OneHotLoop(Loop):
    """The share of each expert from an einsum with one-hot ids."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        shares = torch.einsum("tk,tke->te", weights, F.one_hot(chosen, E).to(x.dtype))
        out = 0
        for number, expert in enumerate(self.experts):
            out = out + shares[:, number : number + 1] * expert(x)
        return out


class RowsLoop(Loop):
    """Each expert for its own rows, found by where."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


class SlicedLoop(nn.Module):
    """Each expert a slice of stacked weights; rows by nonzero of a one-hot mask, as Mixtral."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(softmax_topk_renormalised)
        self.up = nn.Parameter(torch.randn(E, H, D) / 3)
        self.down = nn.Parameter(torch.randn(E, D, H) / 4)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        mask = F.one_hot(chosen, E).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for number in range(E):
            slot, token = torch.where(mask[number])
            rows = F.linear(F.gelu(F.linear(x[token], self.up[number])), self.down[number])
            out.index_add_(0, token, rows * weights[token, slot, None])
        return out


class SlotLoop(Loop):
    """A loop over the slots around it, or inside, where an expert works once for all of them."""

    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        numbers, slots = range(len(self.experts)), range(chosen.shape[-1])
        pairs = [(e, k) for e in numbers for k in slots]
        if not self.inside:
            pairs.sort(key=lambda pair: pair[1])
        results = [expert(x) for expert in self.experts]
        out = torch.zeros_like(x)
        for e, k in pairs:
            rows = results[e] if self.inside else self.experts[e](x)
            out = out + (chosen[:, k] == e)[:, None] * weights[:, k, None] * rows
        return out


class OtherSlots(SlotLoop):
    """The second slot means the next expert."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        results = [expert(x) for expert in self.experts]
        out = torch.zeros_like(x)
        for k in range(chosen.shape[-1]):
            for e, rows in enumerate(results):
                mask = chosen[:, k] == (e + k) % len(results)
                out = out + mask[:, None] * weights[:, k, None] * rows
        return out


class SharedExpert(Loop):
    """A dense branch is added, gated or not; before the loop or after it."""

    def __init__(self, gated: bool, first: bool) -> None:
        super().__init__()
        self.shared = Mlp()
        self.gate = nn.Linear(D, 1, bias=False) if gated else None
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        dense = self.shared(x)
        if self.gate is not None:
            dense = torch.sigmoid(self.gate(x)) * dense
        if not self.first:
            return super().forward(x) + dense
        weights, chosen = self.router(x)
        out = dense
        for number, expert in enumerate(self.experts):
            out = out + (weights * (chosen == number)).sum(-1)[:, None] * expert(x)
        return out


class Placed(Loop):
    """A table contains the position of the chosen expert."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.tensor([2, 0, 3, 1]))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.table[self.router(x)[1][:, 0]]
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out + (chosen == number).float()[:, None] * expert(x)
        return out
