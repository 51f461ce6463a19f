"""Routing rules in plain PyTorch: logits [T, C] -> choices [T, k] and their weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moec.capture.behaviour.layer.description import RoutingRule


def _sparsemixer(logits: torch.Tensor, jitter: float = 0.01) -> torch.Tensor:
    """The two choices of PhiMoE at inference (arXiv 2310.00811): the weight of each is a softmax
    over the logits near the greatest that remains."""
    weights, remaining = torch.zeros_like(logits), logits
    for _ in range(2):
        top, ids = remaining.max(-1, keepdim=True)
        far = (top - logits) / logits.abs().clamp(min=top) > 2 * jitter
        near = remaining.masked_fill(far, -math.inf).softmax(-1).gather(1, ids)
        weights = weights.scatter(1, ids, near)
        remaining = remaining.scatter(1, ids, -math.inf)
    return weights


SCORES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "sigmoid": torch.sigmoid,
    "none": lambda z: z,
    "relu": F.relu,
    "softplus": F.softplus,
    "sqrtsoftplus": lambda z: F.softplus(z).sqrt(),
    "sparsemixer": _sparsemixer,
}


@dataclass(frozen=True)
class Choices:
    """ids [T, k], weights [T, k] and scores [T, C]. `mask` [T, k] is False for choices that a
    threshold drops, and None without a threshold. `measure` [T, k] is what the threshold is
    compared with."""

    ids: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor
    mask: torch.Tensor | None = None
    measure: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """Weights [T, C], zero where a column was not chosen."""
        return torch.zeros_like(self.scores).scatter(1, self.ids, self.weights)

    def chosen(self) -> torch.Tensor:
        """[T, C]: one for each column that was chosen and kept, else zero."""
        ones = torch.ones_like(self.weights) if self.mask is None else self.mask.to(self.scores)
        return torch.zeros_like(self.scores).scatter(1, self.ids, ones)

    def first(self) -> torch.Tensor:
        """[T, C]: one for the best column of each row, even if it is dropped, else zero."""
        return torch.zeros_like(self.scores).scatter(1, self.ids[:, :1], 1.0)


def choose(
    rule: RoutingRule, logits: torch.Tensor, correction: torch.Tensor | None = None
) -> Choices:
    """The choices of `rule`; `correction` [C] is the tensor that the rule names."""
    scaled = logits if rule.temperature == 1.0 else logits * rule.temperature
    scores = SCORES[rule.score](scaled)
    rank = scores if rule.ranked_by == "score" else logits
    rank = rank if correction is None else rank + correction
    if rule.groups:
        rank = _within_groups(rank, *rule.groups)
    ids = _best(rank, rule)
    weights = scores.gather(1, ids)
    if rule.renormalise:
        weights = weights / _sum(weights, rule)
    mask, measure = None, None
    if rule.threshold_on:
        measure = _measure(rule, scores, weights, ids)
        mask = measure > (-rule.threshold if rule.threshold_on == "mass" else rule.threshold)
        weights = weights * mask
    if rule.renormalise_again:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights if rule.scale == 1.0 else weights * rule.scale
    return Choices(ids, weights, scores, mask, measure)


def _best(rank: torch.Tensor, rule: RoutingRule) -> torch.Tensor:
    if rule.ties == "topk":
        return rank.topk(rule.top_k, -1).indices
    return rank.sort(dim=-1, descending=True, stable=True).indices[:, : rule.top_k]


def _sum(weights: torch.Tensor, rule: RoutingRule) -> torch.Tensor:
    total = weights.sum(-1, keepdim=True)
    if rule.eps_is_floor:
        return total.clamp(min=rule.eps)
    return total + rule.eps if rule.eps else total


def _within_groups(rank: torch.Tensor, count: int, top: int, best: int) -> torch.Tensor:
    """`rank` with the members of all groups but the `top` best set to minus infinity."""
    parts = rank.reshape(-1, count, rank.shape[-1] // count)
    groups = parts.topk(best, -1).values.sum(-1).topk(top, -1).indices
    use = torch.zeros_like(parts[..., 0]).scatter(1, groups, 1.0)
    return parts.masked_fill(use[..., None] == 0, -math.inf).reshape(rank.shape)


def _measure(
    rule: RoutingRule, scores: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """A value that grows with a choice's importance: its weight, its score, or minus the sum of the
    scores before it."""
    if rule.threshold_on == "weight":
        return weights
    if rule.threshold_on == "score":
        return scores.gather(1, ids)
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores).scatter(1, order, ordered - ordered.cumsum(-1)).gather(1, ids)


LOSSES: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "switch loss": lambda z, chosen: z.shape[-1] * (chosen.mean(0) * z.softmax(-1).mean(0)).sum(),
    "z loss": lambda z, chosen: z.logsumexp(-1).square().mean(),
}
"""Losses of logits [T, C] and choices [T, C] that modules return: Switch (arXiv 2101.03961, eq. 4)
and the router z-loss (arXiv 2202.08906, eq. 5)."""
