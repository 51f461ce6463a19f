"""Routing: how moe.route and moe.gate turn logits into choices of experts and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moec.dtypes import HALVES
from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import Op


@dataclass(frozen=True)
class Routing:
    """The parameters of a router.

    scores = score(logits); the k best of scores + correction are chosen, within the best
    `top_groups` of `groups` groups where these are set; weights = after(scores of the chosen),
    divided by their sum + epsilon where `renormalize`, times `scale`. Ties: the lower id wins.
    A choice depends on roundings: scores are rounded to `score_dtype` where that has 16 bits, and
    scores + correction and the scores of groups to `choice_dtype`.
    `score="sparsemixer"` is PhiMoE's sampler at inference (arXiv 2310.00811) with `jitter`.
    """

    k: int
    score: str = "softmax"  # softmax, sigmoid, none, sparsemixer
    after: str = "none"  # none, softmax, sigmoid
    renormalize: bool = False
    epsilon: float = 0.0
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"  # max, top2sum
    jitter: float = 0.0
    dtype: str = "f32"  # of the weights
    score_dtype: str = "f32"
    choice_dtype: str = "f32"

    @staticmethod
    def of(op: Op) -> Routing:
        fields = {name: op.attrs[name] for name in Routing.__dataclass_fields__ if name in op.attrs}
        return Routing(**fields)  # type: ignore[arg-type]

    def attrs(self) -> dict[str, Any]:
        """As attributes of an op: k, and the fields that differ from their defaults."""
        fields = Routing.__dataclass_fields__
        return {
            name: getattr(self, name)
            for name in fields
            if name == "k" or getattr(self, name) != fields[name].default
        }


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The ids of the k greatest scores, descending, equal ones by ascending id; NaN is greatest."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def widened(floats: torch.Tensor) -> torch.Tensor:
    """float64 as it is, and narrower floats in float32."""
    return floats if floats.dtype == torch.float64 else floats.float()


def _rounded(floats: torch.Tensor, dtype: str) -> torch.Tensor:
    """The floats rounded to `dtype` if that has 16 bits, in their own dtype."""
    return floats.to(TORCH_DTYPES[dtype]).to(floats.dtype) if dtype in HALVES else floats


def _scores(routing: Routing, logits: torch.Tensor) -> torch.Tensor:
    scores = widened(logits)
    if routing.score == "softmax":
        scores = scores.softmax(-1)
    elif routing.score == "sigmoid":
        scores = scores.sigmoid()
    return _rounded(scores, routing.score_dtype)


def choice_scores(
    routing: Routing, logits: torch.Tensor, correction: torch.Tensor | None
) -> torch.Tensor:
    """f32 or f64[.., E]: the scores that choose experts, before the restriction to groups."""
    scores = _scores(routing, logits)
    if correction is not None:
        scores = scores + widened(correction)
    return _rounded(scores, routing.choice_dtype)


def group_scores(routing: Routing, choice: torch.Tensor) -> torch.Tensor:
    """f32[.., groups]: the scores by which groups are chosen, from choice scores [.., E]."""
    ranked = _grouped(routing, choice).sort(-1, descending=True).values
    if routing.group_score == "max":
        return ranked[..., 0]
    return _rounded(ranked[..., :2].sum(-1), routing.choice_dtype)


def _grouped(routing: Routing, choice: torch.Tensor) -> torch.Tensor:
    size = choice.shape[-1] // routing.groups
    return choice.reshape(*choice.shape[:-1], routing.groups, size)


def chosen_by(routing: Routing, choice: torch.Tensor) -> torch.Tensor:
    """i64[.., k]: the experts that choice scores [.., E] choose."""
    if routing.groups > 1:
        groups = group_scores(routing, choice)
        best = top_k(groups, routing.top_groups)
        chosen_groups = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
        grouped = _grouped(routing, choice)
        choice = grouped.masked_fill(~chosen_groups.unsqueeze(-1), -torch.inf).flatten(-2)
    return top_k(choice, routing.k)


def route_logits(
    routing: Routing, logits: torch.Tensor, correction: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = TORCH_DTYPES[routing.dtype]
    logits = widened(logits)
    if routing.score == "sparsemixer":
        weights, experts = _sparsemixer(logits, routing)
        return weights.to(dtype), experts
    scores = _scores(routing, logits)
    experts = chosen_by(routing, choice_scores(routing, logits, correction))
    weights = scores.gather(-1, experts)
    if routing.after == "softmax":
        weights = weights.softmax(-1)
    elif routing.after == "sigmoid":
        weights = weights.sigmoid()
    if routing.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + routing.epsilon)
    return (weights * routing.scale).to(dtype), experts


def _sparsemixer(logits: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Each choice is the greatest remaining logit; its weight is a softmax over the logits within
    `2*jitter` (relative) of it."""
    left = logits
    weights, experts = [], []
    for _ in range(routing.k):
        greatest = left.max(-1, keepdim=True).values
        chosen = top_k(left, 1)
        factor = logits.abs().clamp(min=greatest)
        far = (greatest - logits) / factor > 2 * routing.jitter
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, chosen))
        experts.append(chosen)
        left = left.scatter(-1, chosen, -torch.inf)
    return torch.cat(weights, -1), torch.cat(experts, -1)
