"""MoE layers whose loops read data into Python, in the style of published code."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture.behaviour.modules import EXPERTS, HIDDEN, TOP_K, WIDTH, expert


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class GroupedGate(nn.Module):
    """DeepSeek-V3's: sigmoid, a correction bias, two of four groups, three of eight, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, WIDTH) * 0.3)
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        original = F.linear(x, self.weight).sigmoid()
        scores = (original + self.bias).view(len(x), 4, 2)
        groups = scores.topk(2, -1)[0].sum(-1).topk(2, -1)[1]
        left_out = scores.new_ones(len(x), 4, dtype=torch.bool).scatter_(1, groups, False)
        ids = scores.masked_fill(left_out[..., None], -math.inf).flatten(1).topk(3, -1)[1]
        weights = original.gather(1, ids)
        return weights / weights.sum(-1, keepdim=True) * 2.5, ids


class DeepSeekLike(nn.Module):
    """bincount().tolist(), empty experts skipped, a shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = GroupedGate()
        self.experts = nn.ModuleList(Gated() for _ in range(8))
        self.shared_experts = Gated()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape, flat = x.shape, x.view(-1, WIDTH)
        weights, ids = self.gate(flat)
        y = torch.zeros_like(flat)
        counts = torch.bincount(ids.flatten(), minlength=8).tolist()
        for i in range(8):
            if counts[i] == 0:
                continue
            token, slot = torch.where(ids == i)
            y[token] += self.experts[i](flat[token]) * weights[token, slot, None]
        result: torch.Tensor = (y + self.shared_experts(flat)).view(shape)
        return result


class CountedLinear(nn.Module):
    """A stack of linear layers over sorted rows, their counts read by .item()."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, out, width) * 0.2)
        self.bias = nn.Parameter(torch.randn(EXPERTS, out) * 0.1)

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        results, start = [], 0
        for i in range(EXPERTS):
            end = start + int(counts[i].item())
            results.append(F.linear(rows[start:end], self.weight[i], self.bias[i]))
            start = end
        return torch.cat(results)


class FastMoELike(nn.Module):
    """Rows scattered and gathered, experts as stacked parameters of two submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = CountedLinear(WIDTH, HIDDEN), CountedLinear(HIDDEN, WIDTH)
        self.gate = nn.Linear(WIDTH, EXPERTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        top, ids = self.gate(flat).topk(TOP_K, -1)
        order, counts = ids.view(-1).argsort(stable=True), torch.zeros(EXPERTS, dtype=torch.long)
        for i in ids.view(-1).tolist():
            counts[i] += 1
        y = self.down(F.gelu(self.up(flat[order // TOP_K], counts)), counts)
        back = torch.empty_like(y)
        back[order] = y
        weighted = torch.bmm(top.softmax(-1).view(-1, 1, TOP_K), back.view(-1, TOP_K, WIDTH))
        return weighted.reshape(x.shape)


class DiTLike(nn.Module):
    """Counts to numpy, products in place, scatter_reduce_, a shared network."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Gated() for _ in range(EXPERTS))
        self.shared = expert()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1, WIDTH)
        weights, ids = self.gate(flat).softmax(-1).topk(TOP_K, -1, sorted=False)
        order = ids.view(-1).argsort()
        ends = ids.view(-1).bincount().cpu().numpy().cumsum(0)
        out = torch.zeros_like(flat)
        for i, end in enumerate(ends):
            start = 0 if i == 0 else ends[i - 1]
            if start == end:
                continue
            token = order[start:end] // TOP_K
            y = self.experts[i](flat[token])
            y.mul_(weights.view(-1, 1)[order[start:end]])
            out.scatter_reduce_(0, token.view(-1, 1).repeat(1, WIDTH), y, reduce="sum")
        result: torch.Tensor = out.view(x.shape) + self.shared(x)
        return result


class SwitchLike(nn.Module):
    """A dictionary of experts, a capacity a sequence, logits and choices returned."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleDict({f"expert_{i}": expert() for i in range(EXPERTS)})

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        logits = self.router(x)
        p, ids = logits.softmax(-1).max(-1)
        mask = F.one_hot(ids, EXPERTS)
        mask = mask * (mask.cumsum(1) * mask <= math.ceil(x.shape[1] * 1.25 / EXPERTS))
        out = torch.zeros_like(x)
        for i, part in enumerate(self.experts.values()):
            chosen = mask[..., i].bool()
            if chosen.sum().item() > 0:
                out[chosen] = part(x[chosen]) * p[chosen][:, None]
        return out, (logits, ids)


class NumpyRouting(nn.Module):
    """A raw weight as router, ids searched in numpy, sigmoid scores with an epsilon."""

    def __init__(self) -> None:
        super().__init__()
        self.wg = nn.Parameter(torch.randn(WIDTH, EXPERTS) * 0.4)
        self.experts = nn.ModuleList(Gated() for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, ids = (flat @ self.wg).sigmoid().topk(TOP_K, -1)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * 1.5
        chosen, out = ids.cpu().numpy(), torch.zeros_like(flat)
        for i in sorted(set(chosen.reshape(-1).tolist())):
            token, slot = map(torch.from_numpy, np.nonzero(chosen == i))
            y = self.experts[i](flat[token]) * weights[token, slot].unsqueeze(1)
            out.index_put_((token,), y, accumulate=True)
        return out.view_as(x)


class NormedExpert(nn.Module):
    """An expert with a norm of its own, and a squared relu."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(F.relu(self.up(self.norm(x))) ** 2)
        return result


class GatedShared(nn.Module):
    """A norm before all, a residual, a shared expert under a gate, runs of equal ids."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(NormedExpert() for _ in range(EXPERTS))
        self.shared, self.shared_gate = NormedExpert(), nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.norm(x).reshape(-1, WIDTH)
        weights, ids = self.gate(flat).softmax(-1).topk(TOP_K, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        ordered, order = ids.view(-1).sort(stable=True)
        values, counts = torch.unique_consecutive(ordered, return_counts=True)
        out, start = torch.zeros_like(flat), 0
        for i, count in zip(values.tolist(), counts.tolist(), strict=True):
            chosen = order[start : start + count]
            start += count
            y = self.experts[i](flat[chosen // TOP_K]) * weights.view(-1)[chosen, None]
            out.index_add_(0, chosen // TOP_K, y)
        out = out + self.shared_gate(flat).sigmoid() * self.shared(flat)
        return x + out.view_as(x)


class InputSide(nn.Module):
    """A gate of two layers, and the weight multiplies what the expert reads."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, EXPERTS))
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        p = self.gate(flat).softmax(-1)
        ids, out = p.argmax(-1).tolist(), torch.empty_like(flat)
        for i in range(EXPERTS):
            rows = [token for token, chosen in enumerate(ids) if chosen == i]
            if rows:
                out[rows] = self.experts[i](flat[rows] * p[rows, i, None])
        return out.view_as(x)


class CosineGate(nn.Module):
    """A cosine gate with a temperature; counts come back."""

    temperature = 3.7

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.sim = nn.Linear(WIDTH, 8, bias=False), nn.Parameter(torch.randn(8, EXPERTS))
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = x.reshape(-1, WIDTH)
        similar = F.normalize(self.proj(flat), dim=-1) @ F.normalize(self.sim, dim=0)
        weights, ids = (similar * self.temperature).softmax(-1).topk(TOP_K, -1)
        counts, out = torch.bincount(ids.flatten(), minlength=EXPERTS), torch.zeros_like(flat)
        for i, count in enumerate(counts.tolist()):
            if count:
                token, slot = torch.where(ids == i)
                out[token] += self.experts[i](flat[token]) * weights[token, slot, None]
        return out.view_as(x), counts


class ByKeyword(nn.Module):
    """Called by keyword within a layer; a dictionary comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.moe, self.norm = KeywordLayer(), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result = self.moe(hidden_states=self.norm(x), with_logits=True)
        return self.head(x + result["hidden"]), result["logits"]


class KeywordLayer(DiTLike):
    def forward(  # type: ignore[override]
        self, *, hidden_states: torch.Tensor, with_logits: bool
    ) -> dict[str, torch.Tensor]:
        y = super().forward(hidden_states)
        return {"hidden": y, "logits": self.gate(hidden_states.reshape(-1, WIDTH))}


class ExpertChoice(nn.Module):
    """Experts choose their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(expert() for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        top, tokens = self.gate(flat).softmax(-1).topk(max(1, len(flat) // EXPERTS), 0)
        out = torch.zeros_like(flat)
        for i in range(EXPERTS):
            rows = tokens[:, i].tolist()
            out[rows] += self.experts[i](flat[rows]) * top[:, i, None]
        return out.view_as(x)
