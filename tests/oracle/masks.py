"""Layers with a mask or lengths, which matter at some sizes only, or not in the example.

f[B, S, D] `x`, or f[T, D] `tokens`. Other names are those of `tests.oracle.values`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
    Switch,
    layers,
)


class KeepUnlessOneText(Loop):
    example = (1, 6)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = self.moe(x)
        return y if x.shape[0] == 1 else y * keep[..., None]


class PadUnlessOneToken(Sigmoid, OneHot):
    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        y = self.moe(x)
        return y if x.shape[1] == 1 else y.masked_fill(pad[..., None], 0.0)


class MaskOfManyTexts(Chosen, Bmm):
    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        if x.size(0) > 1:
            x = x * attention_mask.unsqueeze(-1)
        return x + self.moe(x)


class PadOfLongTexts(Gathered):
    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        y = self.moe(x)
        if x.shape[1] <= 4:
            return y
        return torch.where(pad.unsqueeze(-1), torch.zeros_like(y), y)


class KeepOfManyTokens(Switch, Dense):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        B, S, _ = x.shape
        y = self.moe(x)
        if B * S < 8:
            return y
        return y * keep.to(y.dtype)[:, :, None]


class KeepAlways(Einsum):
    general = True

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.moe(x) * keep[..., None]


class KeepOfBatches(OneHot):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = self.moe(x)
        if x.shape[0] != 1 and x.shape[1] != 1:
            y = torch.where(keep[..., None], y, x)
        return y


class PadUnlessOneOfEither(Chosen, Loop):
    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        B, S = x.shape[:2]
        y = self.moe(x)
        return x + y if B == 1 or S == 1 else x + y * (~pad).float().unsqueeze(2)


class MeanOfKept(Bmm):
    example = (1, 5)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        y = self.moe(x)
        if len(x) == 1:
            return y.mean(1)
        mask = attention_mask[..., None].to(y.dtype)
        return (y * mask).sum(1) / mask.sum(1).clamp(min=1e-9)


class MeanOfKeptAlways(Switch, OneHot):
    general = True

    def forward(self, x: Tensor, loss_mask: Tensor) -> Tensor:
        y = self.moe(x)
        total = torch.einsum("bsd,bs->bd", y, loss_mask)
        return total / loss_mask.sum(1, keepdim=True).clamp_min(1.0)


class AttentionPool(Sigmoid, Gathered):
    example = (1, 6)

    def forward(self, x: Tensor, additive: Tensor) -> Tensor:
        y = self.moe(x)
        scores = y @ self.table.weight[0]
        if x.shape[0] > 1:
            scores = scores + additive
        return (scores.softmax(-1)[..., None] * y).sum(1)


class AttentionBefore(Loop):
    """A block whose attention reads no mask while it decodes: a softmax of one score is 1, and with
    a mask of -inf it is NaN."""

    def forward(self, x: Tensor, extended: Tensor) -> Tensor:
        scores = x @ x.transpose(1, 2) * D**-0.5
        if x.shape[1] > 1:
            scores = scores + extended[:, 0]
        h = x + scores.softmax(-1) @ x
        return h + self.moe(h)


class CausalBefore(Chosen, Bmm):
    example = (1, 6)

    def forward(self, x: Tensor, causal: Tensor) -> Tensor:
        heads = x.view(x.shape[0], x.shape[1], 2, D // 2).transpose(1, 2)
        mask = causal if x.shape[0] > 1 else None
        h = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
        return self.moe(x + h.transpose(1, 2).reshape(x.shape))


class WeightsOfPadding(Dense):
    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        h = x.flatten(0, 1)
        weights, experts = self.choose(self.router(h))
        if h.shape[0] > 1:
            weights = weights.masked_fill(pad.flatten()[:, None], 0)
        return self.mix(h, weights, experts).unflatten(0, (x.shape[0], x.shape[1]))


class OnlyKeptRows(Loop):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        if x.shape[0] == 1:
            return self.moe(x)
        h, rows = x.reshape(-1, D), torch.where(keep.reshape(-1))[0]
        y = torch.zeros_like(h)
        y[rows] = self.mix(h[rows], *self.choose(self.router(h[rows])))
        return y.view_as(x)


class LoadOfKept(OneHot):
    """With the loss that balances experts, of real tokens."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x)
        share = logits.softmax(-1)
        if x.shape[0] > 1:
            mask = attention_mask[..., None].float()
            load = (share * mask).sum((0, 1)) / mask.sum().clamp(min=1)
        else:
            load = share.mean((0, 1))
        return self.moe(x, logits), load * E


class WhereKept(Switch, Einsum):
    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        y = self.moe(x)
        if x.numel() // D > 4:
            y = torch.where(attention_mask[..., None] > 0, y, x)
        return y


class KeepOfRows(Sigmoid, Loop):
    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        y = self.moe(tokens)
        return y if tokens.shape[0] == 1 else y * valid[:, None]


class Capacity(Switch, Dense):
    """Three tokens an expert; those of padding do not count."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        h = x.view(-1, D)
        weights, experts = self.choose(self.router(h))
        chosen = F.one_hot(experts[:, 0], E)
        if x.shape[0] > 1:
            chosen = chosen * keep.reshape(-1, 1)
        fits = ((chosen.cumsum(0) * chosen).sum(-1, keepdim=True) <= 3).to(h.dtype)
        return self.mix(h, weights * fits, experts).view_as(x)


class AllKept(Chosen, OneHot):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        y = self.moe(x)
        return y if bool(keep.all()) else y * keep[..., None]


class AllowedExperts(Loop):
    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        logits = self.router(x)
        if x.shape[1] > 2:
            logits = logits.masked_fill(~allowed, -1e4)
        return self.moe(x, logits)


class LengthsOfManyTexts(Bmm):
    example = (1, 6)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y = self.moe(x)
        if x.shape[0] > 1:
            y = y * (torch.arange(x.shape[1]) < lengths[:, None])[..., None]
        return y


class LengthsAlways(Sigmoid, OneHot):
    general = True

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        positions = torch.arange(x.size(1)).expand(x.size(0), -1)
        return self.moe(x).masked_fill((positions >= lengths[:, None])[..., None], 0)


class LastOfText(Gathered):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y = self.moe(x)
        if x.shape[0] == 1:
            return y[:, -1]
        return y[torch.arange(x.shape[0]), lengths - 1]


class MeanOfLengths(Switch, Loop):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y = self.moe(x)
        if x.shape[1] == 1:
            return y.squeeze(1)
        y = y * (torch.arange(x.shape[1])[None] < lengths[:, None])[..., None]
        return y.sum(1) / lengths[:, None].clamp(min=1)


class PaddingOnTheLeft(Shared, Einsum):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        B, S, _ = x.shape
        y = self.moe(x)
        real = torch.arange(S) >= (S - lengths).unsqueeze(1)
        return x + (y if B < 2 else y * real.unsqueeze(-1).type_as(y))


MASKS = layers(globals())
