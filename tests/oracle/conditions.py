"""Layers with positions, ids, priors, temperatures and other second inputs, and layers of any of
these inputs whose branches have equal sides.

f[B, S, D] `x`, or f[T, D] `tokens`. Other names are those of `tests.oracle.values`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle.experts import (
    Bmm,
    Chosen,
    D,
    Dense,
    E,
    Einsum,
    Gathered,
    Loop,
    OneHot,
    Shared,
    Sigmoid,
    Stacked,
    Switch,
    layers,
)


class PositionsOfTexts(Loop):
    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        logits = self.router(x)
        if x.shape[1] > 1:
            logits = logits + positions[..., None] * self.biases[0]
        return self.moe(x, logits)


class PositionsAlways(Sigmoid, Bmm):
    general = True

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.moe(x + F.embedding(positions, self.table.weight))


class PositionsOfManyTexts(Chosen, OneHot):
    """One text is that of the example, which begins at 0."""

    example = (1, 6)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if x.shape[0] == 1:
            positions = torch.arange(x.shape[1])[None]
        return self.moe(x + self.table(positions))


class HashOfPositions(Stacked):
    """Each position has its expert, and no router."""

    general = True

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        expert = positions % E
        hidden = (x.unsqueeze(-2) @ self.up[expert]).relu()
        return (hidden @ self.down[expert]).squeeze(-2)


class Steps(Switch, Dense):
    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        h = x if x.shape[1] == 1 else x + torch.sin(steps[:, None] / 3.0 ** torch.arange(D))
        return self.moe(h)


class Rotary(Gathered):
    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if x.shape[1] > 1:
            angle = positions[..., None] * 0.3 ** torch.arange(D // 2)
            a, b = x.chunk(2, -1)
            x = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 2)
        return self.moe(x)


class OrderOfRows(Loop):
    """Puts rows back in their order, which is the order of the example."""

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        y = self.moe(x)
        return y if x.shape[0] == 1 else y.index_select(1, steps % x.shape[1])


class Segments(OneHot):
    """The first segment is that of texts without any, and adds nothing."""

    def build(self) -> None:
        super().build()
        self.segments = nn.Embedding(3, D, padding_idx=0)

    def forward(self, x: Tensor, segments: Tensor) -> Tensor:
        y = self.moe(x)
        return y if x.shape[0] == 1 else y + self.segments(segments)


class BiasOfTask(Sigmoid, Loop):
    example = (1, 7)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        logits = self.router(x)
        if x.shape[0] != 1:
            logits = logits + self.biases[task][:, None]
        return self.moe(x, logits)


class ExpertOfDomain(Bmm):
    """All tokens of a text also go to the expert of its domain."""

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        y = self.moe(x)
        if x.shape[0] * x.shape[1] >= 8:
            y = y + torch.bmm(torch.bmm(x, self.up[task]).relu(), self.down[task])
        return y


class ImageExperts(Chosen, Loop):
    """Tokens of images have two of the experts, those of text have all."""

    def forward(self, x: Tensor, types: Tensor) -> Tensor:
        logits = self.router(x)
        if x.shape[1] != 1:
            text = torch.arange(E) < E // 2
            logits = logits.masked_fill((types[..., None] == 1) & text, float("-inf"))
        return self.moe(x, logits)


class ImageTokens(Shared, OneHot):
    general = True

    def forward(self, x: Tensor, types: Tensor) -> Tensor:
        return torch.where(types[..., None] == 1, self.shared(x), self.moe(x))


class ImageTokensOfMany(Dense):
    def forward(self, x: Tensor, types: Tensor) -> Tensor:
        y = self.moe(x)
        if x.shape[0] > 1 or x.shape[1] > 4:
            y = y * (types == 0).unsqueeze(-1)
        return y


class Prior(Switch, OneHot):
    def forward(self, tokens: Tensor, prior: Tensor) -> Tensor:
        logits = self.router(tokens)
        if tokens.shape[0] > 1:
            logits = logits + prior
        return self.moe(tokens, logits)


class PriorOfTexts(Einsum):
    example = (1, 6)

    def forward(self, x: Tensor, priors: Tensor) -> Tensor:
        logits = self.router(x)
        if x.shape[0] > 1:
            logits = logits + priors[:, None, :]
        return self.moe(x, logits)


class Temperature(Sigmoid, Dense):
    def forward(self, x: Tensor, temperature: Tensor) -> Tensor:
        logits = self.router(x)
        if x.shape[0] > 1:
            logits = logits / temperature
        return self.moe(x, logits)


class TemperatureAlways(Gathered):
    general = True

    def forward(self, x: Tensor, temperature: Tensor) -> Tensor:
        logits = self.router(x)
        return self.moe(x, torch.where(temperature == 1, logits, logits / temperature))


class Sharpened(OneHot):
    def forward(self, x: Tensor, sharpness: Tensor) -> Tensor:
        h = x.reshape(-1, D)
        share = self.router(h).softmax(-1)
        if x.shape[1] > 1:
            share = share.pow(sharpness)
        weights, experts = share.topk(2, dim=-1)
        return self.mix(h, weights / weights.sum(-1, keepdim=True), experts).view_as(x)


class Scale(Switch, Bmm):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = self.moe(x)
        return x + (y if x.shape[1] == 1 and x.shape[0] == 1 else y * scale)


class CapacityFactor(Switch, Loop):
    """An expert takes its share of tokens, times the factor of the call."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        h = x.reshape(-1, D)
        weights, experts = self.choose(self.router(h))
        if h.shape[0] > 4:
            chosen = F.one_hot(experts[:, 0], E)
            rank = (chosen.cumsum(0) * chosen).sum(-1, keepdim=True)
            weights = weights * (rank <= (scale + 1) * (h.shape[0] / E))
        return self.mix(h, weights, experts).view_as(x)


class Noise(Chosen, Bmm):
    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        logits = self.router(x)
        if x.shape[1] > 1:
            logits = logits + noise * F.softplus(logits)
        return self.moe(x, logits)


class Previous(Dense):
    """A shift by the state of the call before, which is zero in the first call."""

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        h = x if x.shape[1] > 1 else x + previous[:, None]
        return h + self.moe(h)


class WithShared(Shared, Gathered):
    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        y = self.moe(x)
        return y if x.shape[0] == 1 else torch.where(flag, y + self.shared(x), y)


class KeepAndPositions(Sigmoid, OneHot):
    def forward(self, x: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        h = x + self.table(positions)
        y = self.moe(h)
        return h + (y if x.shape[1] < 2 else y * keep[..., None])


class OneTokenAlike(Loop):
    general = True

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = self.moe(x)
        if x.shape[1] == 1:
            return (y[:, 0] * keep[:, :1]).unsqueeze(1)
        return y * keep[..., None]


class OneTextAlike(Sigmoid, OneHot):
    general = True
    example = (1, 6)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        if x.shape[0] == 1:
            return self.moe(x[0]).masked_fill(pad[0, :, None], 0)[None]
        return self.moe(x).masked_fill(pad[..., None], 0)


class LengthsAlike(Bmm):
    general = True

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(x.shape[1]) < (lengths if x.shape[0] == 1 else lengths[:, None])
        return self.moe(x) * real.expand(x.shape[:2])[..., None]


class DecodeAlike(Loop):
    """Few tokens gather the experts' weights, many go through the loop."""

    general = True

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        h = x.reshape(-1, D) * keep.reshape(-1, 1)
        weights, experts = self.choose(self.router(h))
        if h.shape[0] <= 4:
            full = torch.zeros(h.shape[0], E).scatter(1, experts, weights)
            outs = torch.stack([expert(h) for expert in self.experts], 1)
            return (full[..., None] * outs).sum(1).view_as(x)
        return self.mix(h, weights, experts).view_as(x)


class TemperatureAlike(Gathered):
    general = True

    def forward(self, x: Tensor, temperature: Tensor) -> Tensor:
        logits = self.router(x)
        if x.shape[0] == 1:
            return self.moe(x, logits * temperature.reciprocal())
        return self.moe(x, logits / temperature)


class PriorAlike(Dense):
    general = True

    def forward(self, tokens: Tensor, prior: Tensor) -> Tensor:
        if tokens.shape[0] > 1:
            return self.moe(tokens, self.router(tokens) + prior)
        return self.moe(tokens, F.linear(tokens, self.router.weight, self.router.bias + prior))


class PositionsAlike(Chosen, Loop):
    general = True

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if x.shape[1] == 1:
            return self.moe(x + self.table(positions[:, 0])[:, None])
        return self.moe(x + self.table(positions))


class TaskAlike(Einsum):
    """Alike but for a task below 0, which one text counts from the end and others refuse."""

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        if x.shape[0] > 1:
            bias = F.one_hot(task, 3).float() @ self.biases
        else:
            bias = self.biases[task]
        return self.moe(x, self.router(x) + bias[:, None])


class MeanAlike(Switch, OneHot):
    general = True

    def forward(self, x: Tensor, loss_mask: Tensor) -> Tensor:
        y = self.moe(x)
        if x.shape[1] > 1:
            total = (loss_mask[:, None] @ y)[:, 0]
        else:
            total = (y * loss_mask[..., None]).sum(1)
        return total / loss_mask.sum(1, keepdim=True).clamp(min=1)


class HalvesAlike(Loop):
    """Many texts in two calls, so that less memory is used."""

    general = True

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        half = x.shape[0] // 2
        y = self.moe(x) if half == 0 else torch.cat([self.moe(x[:half]), self.moe(x[half:])])
        return y * keep[..., None]


CONDITIONS = layers(globals())
