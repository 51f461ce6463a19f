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
    NoNetwork,
    Output,
    Router,
)
from moec.capture.behaviour.layer.parts import tensor, walk
from moec.capture.behaviour.layer.rules import LOSSES, SCORES, Choices, choose
from moec.capture.export.huggingface import experts_op


def router_logits(module: nn.Module, description: Description, flat: torch.Tensor) -> torch.Tensor:
    """flat[T, D] -> logits[T, C]."""
    router = description.router
    assert router is not None
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
        if router.cosine:
            rows = F.normalize(rows, dim=-1) @ F.normalize(weight, dim=-1).T
        else:
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
    assert rule is not None
    return choose(rule, logits, tensor(module, rule.correction) if rule.correction else None)


class Replacement:
    """Called with the tokens of the module that it describes, and with expert ids where the module
    takes them; returns by name the tensors that `description.outputs` can refer to."""

    def __init__(
        self, module: nn.Module, description: Description, width: int, body: str = ""
    ) -> None:
        self.module, self.description = module, description
        self.body = body or expert_body(module, description, width)
        first = stacks(module, description)[0] if description.experts else None
        self.count = 0 if first is None else first.shape[0]

    def experts(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """rows[T, D], ids[T, k], weights[T, k] -> weighted sum of the experts' results [T, D]."""
        result: torch.Tensor = experts_op(
            rows, ids, weights, stacks(self.module, self.description), self.count, self.body
        )
        return result

    def __call__(
        self,
        x: torch.Tensor,
        ids: torch.Tensor | None = None,
        names: Collection[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """`names` are the tensors that are computed beside "hidden"; None means all."""
        if self.description.form == "soft slots":
            return {"hidden": self._soft(x)}
        flat = x.reshape(-1, x.shape[-1])
        logits = None
        if self.description.form == "topk":
            logits = router_logits(self.module, self.description, flat)
        chosen = self._choices(flat, logits, ids)
        out = self._weighted_sum(x, flat, chosen)
        out = self._with_added(flat, out)
        named = {"hidden": out}
        if logits is None or (names is not None and not {*names} - named.keys()):
            return named
        side = self._side(logits, chosen)
        return named | {name: of() for name, of in side.items() if names is None or name in names}

    def _choices(
        self, flat: torch.Tensor, logits: torch.Tensor | None, ids: torch.Tensor | None
    ) -> Choices:
        if logits is not None:
            return choices(self.module, self.description, logits)
        if self.description.form == "given":
            assert ids is not None
            picked = ids.reshape(-1, 1)
            return Choices(picked, torch.ones_like(picked, dtype=flat.dtype), flat)
        outer = router_logits(self.module, self.description, flat).softmax(-1)
        inner = [walk(self.module, (n,), flat).softmax(-1) for n in self.description.inner_routers]
        weights = torch.cat([outer[:, i, None] * p for i, p in enumerate(inner)], 1)
        every = torch.arange(self.count).expand(flat.shape[0], self.count)
        return Choices(every, weights, weights)

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
        ids = chosen.ids if mask is None else torch.where(mask, chosen.ids, self.sentinel)
        if description.weighs == "input":
            out = self._input_side(rows, ids, weights)
        else:
            out = self.experts(rows, ids, weights)
        if description.log_sum_exp:
            out = torch.where(out == 0, description.floor, out).log()
        if lost is not None and description.capacity and description.capacity.dropped != "zero":
            out = out + lost * flat
        for column, other in enumerate(description.no_network, start=self.count):
            share = (weights * (ids == column)).sum(-1, keepdim=True)
            if other.kind != "zero":
                out = out + share * self._without_network(other, flat)
        return out

    @property
    def sentinel(self) -> int:
        """An id that is no column of the router."""
        return self.count + len(self.description.no_network)

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

    def _without_network(self, other: NoNetwork, flat: torch.Tensor) -> torch.Tensor:
        if other.kind == "copy":
            return flat
        mix = walk(self.module, other.mix, flat).softmax(-1)
        return mix[:, :1] * flat + mix[:, 1:] * tensor(self.module, other.constants)[other.row]

    def _with_added(self, flat: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        for added in self.description.added:
            value = walk(self.module, added.path, flat)
            if added.gate:
                value = value * walk(self.module, added.gate, flat).sigmoid()
            elif added.factor != 1.0:
                value = value * added.factor
            out = out + value
        return out

    def _side(self, logits: torch.Tensor, chosen: Choices) -> dict[str, Callable[[], torch.Tensor]]:
        """Functions that compute the other tensors that modules return, by name."""
        rule = self.description.routing
        assert rule is not None
        picked, best = chosen.chosen(), chosen.first()
        side: dict[str, Callable[[], torch.Tensor]] = {
            "logits": lambda: logits,
            "scores": lambda: SCORES[rule.score](logits),
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

    def _soft(self, x: torch.Tensor) -> torch.Tensor:
        """The "soft slots" form: slots are mixtures of a sequence's tokens; experts read slots."""
        router = self.description.router
        assert router is not None
        z = torch.einsum("bnd,des->bnes", x, tensor(self.module, router.weight))
        slots = torch.einsum("bnd,bnes->ebsd", x, z.softmax(1))
        rows = slots.reshape(-1, x.shape[-1])
        each = rows.shape[0] // self.count
        ids = torch.arange(self.count)[:, None].expand(self.count, each).reshape(-1, 1)
        results = self.experts(rows, ids, torch.ones_like(ids, dtype=x.dtype)).view_as(slots)
        return torch.einsum("ebsd,bnes->bnd", results, z.flatten(2).softmax(-1).view_as(z))


def capacity_rows(capacity: Capacity, size: int, columns: int) -> int:
    """How many of `size` tokens one expert accepts; symbolic where `size` is."""
    top = size * capacity.factor.numerator
    bottom = capacity.factor.denominator * columns
    rows: int = -(-top // bottom) if capacity.round_up else top // bottom
    if isinstance(size, int):
        return max(capacity.least, rows)
    symbolic: int = torch.sym_max(capacity.least, rows)
    return symbolic


def outputs(
    replacement: Replacement, x: torch.Tensor, ids: torch.Tensor | None = None
) -> list[object]:
    """The leaves of the module's result, in its order: tensors and constants."""
    items = replacement.description.outputs
    named = replacement(x, ids, {item.name for item in items if isinstance(item, Output)})
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
