"""moe.force: choices in which every token has an expert that an input names.

Hybrid routing of ApolloMoE (arXiv 2410.10626): the expert of a token's language is put in the
place of its last choice where the router has not chosen it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moec.ir.graph import Op, TensorType
from moec.ir.opdef import Runner, defop, require
from moec.ir.ops.routing.routing import Routing, choice_scores


def _infer_force(op: Op) -> tuple[TensorType, ...]:
    weights, experts, logits, forced = op.inputs
    require(op, weights.shape == experts.shape, f"{weights.type} weighs {experts.type}")
    require(op, logits.shape[:1] == experts.shape[:1], f"{logits} are not of {experts}")
    require(op, forced.shape == experts.shape[:1], f"{forced} is not one id for each token")
    return (weights.type, experts.type)


@defop("moe.force", _infer_force, "weights, experts, logits, forced", tokenwise=True)
def force(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """weights[T, k], experts[T, k], logits[T, E], forced[T] -> weights[T, k], experts[T, k].

    Where forced[t] is none of experts[t], it takes the place of the last one, and its weight is
    score(logits)[t, forced[t]] times `scale`. Attributes: `score` and `scale` of `Routing`.
    """
    weights, experts, logits, forced = tensors
    routing = Routing.of(op)
    column = forced.long()[:, None]
    missing = (experts != column).all(-1, keepdim=True)
    score = choice_scores(routing, logits, None).gather(1, column) * routing.scale
    last = torch.where(missing, column, experts[:, -1:])
    weight = torch.where(missing, score.to(weights.dtype), weights[:, -1:])
    return torch.cat([weights[:, :-1], weight], 1), torch.cat([experts[:, :-1], last], 1)
