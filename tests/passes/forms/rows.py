"""Small MoE layers in which each expert reads its own rows and writes them back: x[T, D] -> y."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.forms.experts import Mlp
from tests.passes.forms.loops import Loop
from tests.passes.forms.routers import softmax_topk, switch
from tests.passes.forms.sizes import D, E


class Added(Loop):
    """Added in place."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            out[token] += expert(x[token]) * weights[token, slot, None]
        return out


class Masked(Loop):
    """Masks pick the rows; a loop over slots is around the one over experts."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for slot in range(chosen.shape[1]):
            for number, expert in enumerate(self.experts):
                mask = chosen[:, slot] == number
                out[mask] += expert(x[mask]) * weights[mask, slot][:, None]
        return out


class OtherWeights(Masked):
    """The second slot has experts of its own: no block with two slots."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList(Mlp() for _ in range(E))
        self.experts = nn.ModuleList(Mlp() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for slot, experts in enumerate((self.experts, self.others)):
            for number, expert in enumerate(experts):
                mask = chosen[:, slot] == number
                out[mask] += expert(x[mask]) * weights[mask, slot][:, None]
        return out


class SlotRows(Loop):
    """Each slot is a row of its own, written in place, then summed: DeepSeek's training form."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        rows = x.repeat_interleave(chosen.shape[1], 0)
        flat = chosen.view(-1)
        out = torch.empty_like(rows)
        for number, expert in enumerate(self.experts):
            out[flat == number] = expert(rows[flat == number])
        return (out.view(*weights.shape, -1) * weights[..., None]).sum(1)


class Written(Loop):
    """Written, not added: of two experts of a token, the last one counts."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            out[token] = expert(x[token]) * weights[token, slot, None]
        return out


class Kept(Loop):
    """torch.where keeps the old value of tokens that did not choose the expert."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = torch.where(chosen[:, :1] == number, expert(x) * weights[:, :1], out)
        return out


class Counted(Loop):
    """Rows sorted by expert are split by how many each has, as JetMoE does."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts = F.one_hot(flat, len(self.experts)).sum(0).tolist()
        token = order // chosen.shape[1]
        parts = x[token].split(counts, dim=0)
        result = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        result = result * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, token, result)


class Asked(Loop):
    """Experts without rows are skipped; their numbers run backwards."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        out = torch.zeros_like(x)
        for number in reversed(range(len(self.experts))):
            mask = (chosen == number).any(-1)
            if mask.any():
                share = (weights * (chosen == number)).sum(-1)
                out[mask] += self.experts[number](x[mask]) * share[mask].unsqueeze(-1)
        return out


class SlotSums(Loop):
    """A sum for each slot, weighed as a whole: a block for each slot."""

    def __init__(self) -> None:
        super().__init__(rule=softmax_topk)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x)
        total = torch.zeros_like(x)
        for slot in range(chosen.shape[1]):
            out = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                mask = chosen[:, slot] == number
                out[mask] = expert(x[mask])
            total = total + out * weights[:, slot, None]
        return total


class Places(Loop):
    """GShard: [E, C, D] by a dispatch mask; each expert is a module and takes its part."""

    def __init__(self, chunks: bool) -> None:
        super().__init__(rule=switch)
        self.chunks = chunks

    def forward(self, x: Tensor) -> Tensor:
        size = 3
        weights, chosen = self.router(x)
        hot = F.one_hot(chosen[:, 0], E)
        position = (hot.cumsum(0) * hot).sum(-1) - 1
        hot = hot * (position < size)[:, None]
        dispatch = hot[..., None] * F.one_hot(position.clamp(max=size - 1), size)[:, None]
        rows = torch.einsum("tec,td->ecd", dispatch.to(x.dtype), x)
        if self.chunks:  # as DeepSpeed, with an axis for the ranks
            parts = rows.reshape(1, E, size, D).chunk(E, dim=1)
            done = torch.cat([f(part) for f, part in zip(self.experts, parts, strict=True)], dim=1)
        else:
            done = torch.stack([f(rows[number]) for number, f in enumerate(self.experts)])
        combine = dispatch * weights[..., None]
        return torch.einsum("tec,ecd->td", combine, done.reshape(E, size, D))
