"""A description as a function of plain operators, which is captured instead of the module.

    x[.., D] -> logits[T, C] -> ids[T, k], weights[T, k] -> moe experts -> sum -> y[.., D]

Experts are one call of `moec::experts`, in which an id beyond the experts adds nothing. Choices
that a threshold or a capacity drops get such an id.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from moec.capture.behaviour.expert_body import expert_body, stacks
from moec.capture.behaviour.layer.description import (
    Capacity,
    Constant,
    Description,
    Output,
    Router,
)
from moec.capture.behaviour.layer.parts import tensor, walk
from moec.capture.behaviour.layer.rules import LOSSES, Choices, choose
from moec.capture.export.huggingface import experts_op


def router_logits(module: nn.Module, description: Description, flat: torch.Tensor) -> torch.Tensor:
    """flat[T, D] -> logits[T, C]."""
    router = description.router
    if description.precision == "logits":
        router = _as_product(module, router)
    rows = walk(module, router.path, flat)
    if router.weight:
        weight = tensor(module, router.weight)
        weight = weight if weight.shape[-1] == rows.shape[-1] else weight.T
        bias = tensor(module, router.bias) if router.bias else None
        if description.precision == "logits":
            rows, weight = rows.float(), weight.float()
            bias = None if bias is None else bias.float()
        rows = F.linear(rows, weight, bias)
    return rows.float() if description.precision else rows


def _as_product(module: nn.Module, router: Router) -> Router:
    """A router that ends in a linear layer, written with its weight and bias, which can be cast."""
    last = module.get_submodule(router.path[-1]) if router.path else None
    if router.weight or not isinstance(last, nn.Linear):
        return router
    name = router.path[-1]
    bias = "" if last.bias is None else f"{name}.bias"
    return Router(router.path[:-1], f"{name}.weight", bias)


def choices(module: nn.Module, description: Description, logits: torch.Tensor) -> Choices:
    rule = description.routing
    return choose(rule, logits, tensor(module, rule.correction) if rule.correction else None)


class Replacement:
    """Called with the tokens of the module that it describes; returns by name the tensors that
    `description.outputs` can refer to."""

    def __init__(
        self, module: nn.Module, description: Description, width: int, body: str = ""
    ) -> None:
        self.module, self.description = module, description
        self.body = body or expert_body(module, description, width)
        self.count = stacks(module, description)[0].shape[0]

    def experts(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """rows[T, D], ids[T, k], weights[T, k] -> weighted sum of the experts' results [T, D]."""
        result: torch.Tensor = experts_op(
            rows, ids, weights, stacks(self.module, self.description), self.count, self.body
        )
        return result

    def __call__(
        self, x: torch.Tensor, names: Collection[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """`names` are the tensors that are computed beside "hidden"; None means all."""
        flat = x.reshape(-1, x.shape[-1])
        logits = router_logits(self.module, self.description, flat)
        chosen = choices(self.module, self.description, logits)
        named = {"hidden": self._with_added(flat, self._weighted_sum(x, flat, chosen))}
        if names is not None and not {*names} - named.keys():
            return named
        side = self._side(logits, chosen)
        return named | {name: of() for name, of in side.items() if names is None or name in names}

    def _weighted_sum(self, x: torch.Tensor, flat: torch.Tensor, chosen: Choices) -> torch.Tensor:
        description = self.description
        rows = walk(self.module, description.source, flat)
        mask, weights = chosen.mask, chosen.weights
        if description.precision:
            weights = weights.to(flat.dtype)
        lost = None
        if description.capacity is not None:
            fits = self._fits(x, chosen, description.capacity)
            dropped = (~fits).to(flat.dtype)
            if description.capacity.dropped == "weighted":
                dropped = dropped * weights
            lost = dropped.sum(-1, keepdim=True)
            mask = fits if mask is None else mask & fits
            weights = weights * fits
        ids = chosen.ids if mask is None else torch.where(mask, chosen.ids, self.count)
        if description.weighs == "input":
            out = self._input_side(rows, ids, weights)
        else:
            out = self.experts(rows, ids, weights)
        if lost is not None and description.capacity and description.capacity.dropped != "zero":
            out = out + lost * flat
        return out

    def _input_side(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The sum of experts' results, where each choice scales the row that its expert reads."""
        scaled = (rows[:, None] * weights[..., None]).reshape(-1, rows.shape[-1])
        single = ids.reshape(-1, 1)
        results = self.experts(scaled, single, torch.ones_like(single, dtype=rows.dtype))
        return results.reshape(-1, ids.shape[1], rows.shape[-1]).sum(1)

    def _fits(self, x: torch.Tensor, chosen: Choices, capacity: Capacity) -> torch.Tensor:
        """bool[T, k]: whether the chosen expert has capacity left after the tokens before."""
        size = x.shape[-2] if capacity.per == "sequence" else x.numel() // x.shape[-1]
        columns = chosen.scores.shape[-1]
        chosen_by_sequence = chosen.chosen().reshape(-1, size, columns)
        before = (chosen_by_sequence.cumsum(1) - chosen_by_sequence).reshape(-1, columns)
        positions = before.gather(1, chosen.ids)
        return positions < capacity_rows(capacity, size, columns)

    def _with_added(self, flat: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        for added in self.description.added:
            value = walk(self.module, added.path, flat)
            if added.gate:
                value = value * walk(self.module, added.gate, flat).sigmoid()
            out = out + value
        return out

    def _side(self, logits: torch.Tensor, chosen: Choices) -> dict[str, Callable[[], torch.Tensor]]:
        """Functions that compute the other tensors that modules return, by name."""
        picked, best = chosen.chosen(), chosen.first()
        side: dict[str, Callable[[], torch.Tensor]] = {
            "logits": lambda: logits,
            "scores": lambda: chosen.scores,
            "weights": chosen.dense,
            "top weights": lambda: chosen.weights,
            "ids": lambda: chosen.ids,
            "counts": lambda: picked.sum(0),
            "counts of first choices": lambda: best.sum(0),
        }
        for name, loss in LOSSES.items():
            side[name] = partial(loss, logits, picked)
            side[f"{name} of first choices"] = partial(loss, logits, best)
        return side


def capacity_rows(capacity: Capacity, size: int, columns: int) -> int:
    """How many of `size` tokens one expert accepts; symbolic where `size` is."""
    top = size * capacity.factor.numerator
    bottom = capacity.factor.denominator * columns
    rows: int = -(-top // bottom) if capacity.round_up else top // bottom
    if isinstance(size, int):
        return max(capacity.least, rows)
    symbolic: int = torch.sym_max(capacity.least, rows)
    return symbolic


def outputs(replacement: Replacement, x: torch.Tensor) -> list[object]:
    """The leaves of the module's result, in its order: tensors and constants."""
    items = replacement.description.outputs
    named = replacement(x, {item.name for item in items if isinstance(item, Output)})
    return [
        item.value if isinstance(item, Constant) else shaped(named[item.name], item, x)
        for item in items
    ]


def shaped(value: torch.Tensor, output: Output, x: torch.Tensor) -> torch.Tensor:
    """A tensor in the shape and dtype in which the module returns it. Floats have the tokens' dtype
    unless `output.cast` names another."""
    if output.leading == "tokens":
        value = value.reshape(*x.shape[:-1], value.shape[-1])
    elif output.leading == "token":
        value = value.reshape(x.shape[:-1])
    elif output.leading == "rows":
        value = value.reshape(-1, value.shape[-1])
    if output.cast:
        return value.to(getattr(torch, output.cast))
    dtype: torch.dtype = getattr(torch, output.dtype)
    return value.to(x.dtype if dtype.is_floating_point else dtype)
