"""Routings other than a top-k per token: bounds on weights, probability masses, masks, external
choices.

Each is written in two or three ways. Inputs are f32[B, S, WIDTH], and those that `inputs` adds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.capture.behaviour.modules import EXPERTS, TOP_K, WIDTH, Layer


class Routing(Layer):
    """All experts on all rows, each weighed by its share: subclasses say which [T, E]."""

    def forward(self, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        shares = self.shares(flat, *more)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            out = out + shares[:, i, None] * expert(flat)
        return out.view_as(x)

    def shares(self, flat: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        weights, ids = self.choose(flat)
        return torch.zeros(len(flat), EXPERTS).scatter(1, ids, weights)

    def inputs(self, batch: int, length: int) -> tuple[torch.Tensor, ...]:
        return (torch.randn(batch, length, WIDTH),)


class WeightsOverABound(Routing):
    """Weights under a bound are 0; the others are as they were."""

    def shares(self, flat: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        weights, ids = self.choose(flat)
        weights = torch.where(weights > 0.4, weights, 0.0)
        return torch.zeros(len(flat), EXPERTS).scatter(1, ids, weights)


class ScoresOverABound(Routing):
    """As many experts as have a score over a bound, and no top-k."""

    def shares(self, flat: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.gate(flat).sigmoid()
        return scores * (scores > 0.6)


class Mass(Routing):
    """As many of the likeliest experts as reach a mass of 0.6 together."""

    def shares(self, flat: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        p, ids = self.gate(flat).softmax(-1).sort(-1, descending=True)
        mask = p * (p.cumsum(-1) - p < 0.6)
        return torch.zeros_like(p).scatter(1, ids, mask / mask.sum(-1, keepdim=True))


class MassWithoutRenormalising(Routing):
    """The first is taken always; the others while the mass before them is below the bound."""

    def shares(self, flat: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.gate(flat).softmax(-1)
        p, ids = scores.topk(EXPERTS, -1)
        over = p.cumsum(-1) > 0.6
        over = F.pad(over[:, :-1], (1, 0))
        return scores.masked_fill(torch.zeros_like(over).scatter(1, ids, over), 0.0)


class PaddingInTheWeights(Routing):
    """Tokens of padding have no weight."""

    def shares(self, flat: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        return super().shares(flat) * more[0].reshape(-1, 1)

    def inputs(self, batch: int, length: int) -> tuple[torch.Tensor, ...]:
        mask = torch.ones(batch, length)
        mask[:, length // 2 :] = 0
        return torch.randn(batch, length, WIDTH), mask


class PaddingInTheChoice(PaddingInTheWeights):
    """Tokens of padding choose an expert that is none, in a loop over rows."""

    def forward(self, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, ids = self.choose(flat)
        ids = ids.masked_fill(more[0].reshape(-1, 1) == 0, EXPERTS)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(ids == i)
            out = out.index_add(0, token, expert(flat[token]) * weights[token, slot, None])
        return out.view_as(x)


class PaddingInTheLogits(PaddingInTheWeights):
    """The logits of padding are halved."""

    def shares(self, flat: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        logits = self.gate(flat) * (0.5 + 0.5 * more[0].reshape(-1, 1))
        weights, ids = logits.softmax(-1).topk(TOP_K, -1)
        return torch.zeros(len(flat), EXPERTS).scatter(1, ids, weights)


class ChosenOutside(Routing):
    """The experts' ids arrive, one a token."""

    def forward(self, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        flat, ids = x.reshape(-1, WIDTH), more[0].reshape(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = ids == i
            out[rows] = expert(flat[rows])
        return out.view_as(x)

    def inputs(self, batch: int, length: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(batch, length, WIDTH), torch.randint(EXPERTS, (batch, length))


class ChosenOutsideWithWeights(Routing):
    """Ids and weights arrive [B, S, k]."""

    def forward(self, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        ids, weights = more[0].reshape(-1, TOP_K), more[1].reshape(-1, TOP_K)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, slot = torch.where(ids == i)
            out = out.index_add(0, token, expert(flat[token]) * weights[token, slot, None])
        return out.view_as(x)

    def inputs(self, batch: int, length: int) -> tuple[torch.Tensor, ...]:
        x = torch.randn(batch, length, WIDTH)
        scores = torch.rand(batch, length, EXPERTS).topk(TOP_K, -1)
        return x, scores.indices, scores.values


class OneHotOutside(ChosenOutside):
    """The choice arrives as ids, and is used as a table of zeros and ones."""

    def forward(self, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        shares = F.one_hot(more[0].reshape(-1), EXPERTS).to(x.dtype)
        results = torch.stack([expert(flat) for expert in self.experts], 1)
        return (results * shares[..., None]).sum(1).view_as(x)


class WeighedTableOutside(ChosenOutsideWithWeights):
    """Ids and weights arrive, and each expert's share is a sum over the slots."""

    def forward(self, x: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, WIDTH)
        ids, weights = more[0].reshape(-1, TOP_K), more[1].reshape(-1, TOP_K)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            out = out + expert(flat) * ((ids == i) * weights).sum(-1, keepdim=True)
        return out.view_as(x)
