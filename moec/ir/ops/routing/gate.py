"""moe.route, moe.gate, moe.capacity: logits [T, E] -> weights and experts [T, k]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from moec.ir.graph import Op, TensorType
from moec.ir.opdef import Runner, defop, require, tensors_of
from moec.ir.ops.routing.routing import Routing, choice_scores, route_logits
from moec.ir.sizes.dims import Dim


def _route_types(op: Op, tokens: Dim, experts: Dim) -> tuple[TensorType, ...]:
    routing = Routing.of(op)
    require(op, routing.score in ("softmax", "sigmoid", "none", "sparsemixer"), "unknown score")
    require(op, routing.after in ("none", "softmax", "sigmoid"), "unknown after")
    require(op, routing.group_score in ("max", "top2sum"), "unknown group_score")
    if isinstance(experts, int):
        require(op, 1 <= routing.k <= experts, f"k={routing.k} of {experts} experts")
        require(op, experts % routing.groups == 0, f"{routing.groups} groups of {experts} experts")
    return (
        TensorType(routing.dtype, (tokens, routing.k)),
        TensorType("i64", (tokens, routing.k)),
    )


def _infer_route(op: Op) -> tuple[TensorType, ...]:
    logits = op.inputs[0]
    require(op, len(logits.shape) == 2, f"logits are {logits.type}, expected [T, E]")
    for correction in op.inputs[1:]:
        require(op, correction.shape == logits.shape[1:], "the correction is not [E]")
    return _route_types(op, *logits.shape)


@defop("moe.route", _infer_route, "logits, correction?", tokenwise=True)
def route(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """logits[T, E], correction[E]? -> weights[T, k], experts[T, k]; attributes: `Routing`."""
    return route_logits(Routing.of(op), *logits_of(op, tensors, attrs))


def logits_of(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The logits and the correction of a moe.route or a moe.gate."""
    if op.name == "moe.route":
        return tensors[0], tensors[1] if len(tensors) > 1 else None
    x, weight, bias, correction = tensors_of("moe.gate", op, tensors, attrs).values()
    compute = attrs["compute"]
    bias = None if bias is None else bias.to(compute)
    logits = torch.nn.functional.linear(x.to(compute), weight.to(compute), bias)
    return logits.to(attrs["logits"]), correction


def _infer_gate(op: Op) -> tuple[TensorType, ...]:
    x, weight = op.inputs[:2]
    require(op, len(x.shape) == 2 and x.shape[1:] == weight.shape[1:], f"{x} by {weight}")
    return _route_types(op, x.shape[0], weight.shape[0])


@defop("moe.gate", _infer_gate, "x, weight, bias?biased, correction?corrected", tokenwise=True)
def gate(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """x[T, D], weight[E, D], bias[E]?, correction[E]? -> weights[T, k], experts[T, k].

    Attributes: those of `Routing`, `biased` (bias exists), `corrected` (correction exists),
    `logits` (the dtype to which the linear layer's result is rounded), `compute` (the dtype in
    which it runs).
    """
    return route_logits(Routing.of(op), *logits_of(op, tensors, attrs))


def _infer_capacity(op: Op) -> tuple[TensorType, ...]:
    require(op, len(op.inputs[0].shape) == 2, "experts are not [T, k]")
    return (op.inputs[0].type,)


@defop("moe.capacity", _infer_capacity, "experts")
def capacity(op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner) -> Any:
    """experts[T, k] -> experts[T, k], where choices beyond `capacity` per expert are E.

    Attributes: `num_experts`, `capacity` (a size), `order`: "token" counts choices token by
    token (slots within a token in order), "slot" counts all first choices before any second
    one (GShard, arXiv 2006.16668, algorithm 1).
    """
    (experts,), count = tensors, attrs["num_experts"]
    by_slot = attrs.get("order", "slot") == "slot"
    flat = (experts.t() if by_slot else experts).reshape(-1)
    hot = torch.nn.functional.one_hot(flat, count + 1)
    position = (hot.cumsum(0) - hot).gather(1, flat[:, None])[:, 0]
    choices = torch.where(position < attrs["capacity"], flat, count)
    tokens, k = experts.shape
    return choices.reshape(k, tokens).t().contiguous() if by_slot else choices.reshape(tokens, k)


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


def groups_of(op: Op) -> tuple[int, ...]:
    """The number of experts of each group."""
    return cast("tuple[int, ...]", op.attrs["groups"])


def _infer_hierarchy(op: Op) -> tuple[TensorType, ...]:
    values, logits, weights = op.inputs
    groups = groups_of(op)
    require(op, values.shape == logits.shape, f"{logits.type} weighs {values.type}")
    require(op, sum(groups) == values.shape[-1], f"groups {groups} of {values.shape[-1]} experts")
    expected = (*values.shape[:-1], len(groups))
    require(op, weights.shape == expected, f"{weights} does not weigh {len(groups)} groups")
    return (TensorType(values.dtype, values.shape[:-1]),)


@defop("moe.hierarchy", _infer_hierarchy, "values, logits, weights")
def hierarchy(
    op: Op, tensors: Sequence[torch.Tensor], attrs: Mapping[str, Any], run: Runner
) -> Any:
    """values[.., E], logits[.., E], weights[.., G] -> the sum over groups g of
    weights[.., g] * sum over the experts e of g of softmax(logits of g)[.., e] * values[.., e].

    `groups` has the number of experts of each group; the experts of a group are consecutive.
    """
    values, logits, weights = tensors
    groups = list(groups_of(op))
    shares = torch.cat([part.softmax(-1) for part in torch.split(logits, groups, -1)], -1)
    parts = [part.sum(-1) for part in torch.split(shares * values, groups, -1)]
    return (torch.stack(parts, -1) * weights).sum(-1)
