"""Drops the least important experts, with their columns of the router.

    logits = aten.linear(x, w[8, D])          logits = aten.linear(x, w[4, D])
    w, ids = moe.route(logits)                w, ids = moe.route(logits)
    … = moe.dispatch(x, ids) <8>         ->   … = moe.dispatch(x, ids) <4>
    out = moe.experts(…, w1[8, H, D], …)      out = moe.experts(…, w1[4, H, D], …)

The results are those of masking the dropped columns to minus infinity, so they are exact for tokens
that would not have chosen a dropped expert. The memory of the dropped weights is freed.

`keep` is the share of experts to keep, of each layer or of all layers together. For all layers,
experts are ranked by their worth relative to the mean of their layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from moec.errors import NoMatch
from moec.ir.graph import Program, Value
from moec.ir.ops.routing.routing import Routing, route_logits
from moec.passes.calibration.evaluator import LayerStats
from moec.passes.calibration.session import Approximate, Change
from moec.passes.core.moe_layer import MOVES, Layer, constant, expert_outputs
from moec.passes.core.options import option, validate
from moec.passes.specialise.static_routing import restrict_experts

# The error of a layer's output on the calibration rows if experts are masked.
#
#     y[t]              = sum_e c[t, e] f_e(x[t])       c: routing weights, 0 for unchosen experts
#     |y'[t] - y[t]|^2  = d G d                         d = c'[t] - c[t]
#     G[t, e, f]        = f_e(x[t]) . f_f(x[t])
#
# All experts run once on all rows. Given the products G, the error of any set of masked experts
# needs only the routing.

HELD = 256 << 20
"""Bytes of the products G, and of experts' results, that are in memory at once."""


def eliminate_experts(program: Program, layer: Layer, stats: LayerStats) -> torch.Tensor:
    """The worth of each expert by greedy backward elimination: f64[E], all different.

    Each step masks one more expert: the one whose removal changes the layer's output least (of
    equal ones, the higher id). Tokens that chose it are routed again. Its worth is the error of the
    output after the step, relative to the norm, so worths rise from step to step. The last k
    experts are never masked; their worth is infinity.

    The error is that of arXiv 2402.14800, section 3.2, where all sets of experts are tried. At most
    as many rows as HELD allows are used, evenly spaced. Raises NoMatch unless the layer's output is
    the sum of its experts' results by the router's weights.
    """
    _check(program, layer)
    x, logits = (_subsample(t, HELD // (4 * layer.count**2)) for t in (stats.x, stats.logits))
    correction = [constant(program, value).float() for value in layer.route.inputs[1:]]
    products = _products(program, layer, x)
    weighted = bool(layer.combine.attrs.get("weighted"))

    def shares(removed: list[int]) -> torch.Tensor:
        return masked_shares(layer.routing, logits, correction, removed, weighted)

    def squares(off: torch.Tensor, of: torch.Tensor) -> float:
        off = off.double()
        return float(torch.einsum("te,tef,tf->", off, of.double(), off).clamp(min=0))

    unmasked = shares([])
    norm = squares(unmasked, products)
    worth = torch.full((layer.count,), math.inf, dtype=torch.float64)
    removed: list[int] = []
    least = -math.inf
    for _ in range(layer.count - layer.routing.k):
        errors: dict[int, float] = {}
        for e in sorted(set(range(layer.count)) - set(removed), reverse=True):
            off = shares([*removed, e]) - unmasked
            moved = (off != 0).any(-1)
            errors[e] = squares(off[moved], products[moved])
        best = min(errors, key=errors.__getitem__)
        least = max(math.sqrt(errors[best] / norm) if norm else 0.0, math.nextafter(least, 1.0))
        worth[best] = least
        removed.append(best)
    return worth


def masked_shares(
    routing: Routing,
    logits: torch.Tensor,
    correction: list[torch.Tensor],
    removed: list[int],
    weighted: bool,
) -> torch.Tensor:
    """The weight of each expert's result, f32[T, E], with the columns `removed` of the logits
    [T, E] masked to minus infinity; 1 for each chosen expert of a router without weights."""
    mask = torch.zeros(logits.shape[-1])
    mask[removed] = -torch.inf
    scores = logits.float().masked_fill(mask < 0, -torch.inf)
    # A score of sigmoid(-inf) is 0, which a correction could lift above others.
    weights, ids = route_logits(routing, scores, mask + correction[0] if correction else mask)
    return torch.zeros_like(scores).scatter_add_(
        1, ids, weights.float() if weighted else torch.ones_like(weights, dtype=torch.float32)
    )


def _check(program: Program, layer: Layer) -> None:
    if any(op.name == "moe.capacity" for op in layer.between):
        raise NoMatch("the router drops choices beyond a capacity, which by=error does not model")
    if len(layer.dispatch.inputs) > 2:
        raise NoMatch(
            "the routing weights scale the inputs of the experts, and by=error needs a "
            "weighted sum of outputs"
        )
    if not layer.combine.attrs.get("weighted"):
        return
    value = layer.combine.inputs[2]
    while (op := program.graph.producers.get(value)) is not None and op.name in MOVES:
        value = op.inputs[0]
    if value is not layer.route.outputs[0]:
        raise NoMatch("the outputs of the experts are weighted by more than the router's weights")


def _subsample(rows: torch.Tensor, most: int) -> torch.Tensor:
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, max(most, 1)).long()]


def _products(program: Program, layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """G: f32[T, E, E]."""
    assert layer.experts.body is not None
    stacks = {
        param: constant(program, stack)
        for param, stack in zip(layer.experts.body.params, layer.stacks, strict=True)
    }
    each = max(1, HELD // (4 * layer.count * x.shape[-1]))
    results = [expert_outputs(layer, stacks, rows) for rows in torch.split(x, each)]
    return torch.cat([torch.einsum("etd,ftd->tef", result, result) for result in results])


@dataclass(frozen=True)
class PruneExperts:
    """Drop the least important experts and their columns of the router."""

    keep: float = option(0.5, "share of the experts to keep", low=0, high=1)
    by: str = option(
        "usage",
        "the score of an expert: how many tokens choose it (usage); the mean norm of its "
        "weighted output (reap); the change of the layer's output when it is removed, greedily "
        "one expert after another (error); or a random number (random)",
        choices=("usage", "reap", "error", "random"),
    )
    seed: int = option(0, "seed of the random numbers", low=0)
    scope: str = option(
        "layer",
        "whether `keep` applies to each layer, or to all layers together, where a layer keeps at "
        "least top_k experts",
        choices=("layer", "global"),
    )
    name: ClassVar[str] = "prune-experts"
    source: ClassVar[str] = (
        "usage and random: arXiv 2109.10465; reap: arXiv 2510.13999; error: arXiv 2402.14800, "
        "greedily; global: arXiv 2404.05089"
    )

    def __post_init__(self) -> None:
        validate(self)

    def planned(self, program: Program, layers: Iterable[tuple[Layer, LayerStats]]) -> Approximate:
        """The pass itself; with scope=global, a pass that holds the experts to keep of each
        layer."""
        if self.scope == "layer":
            return self
        reasons: dict[Value, str] = {}
        ranked: list[tuple[Layer, torch.Tensor]] = []
        for layer, stats in layers:
            try:
                ranked.append((layer, self.worth(program, layer, stats)))
            except NoMatch as why:
                reasons[layer.output] = str(why)
        return PruneByPlan(self, {**reasons, **rank_experts(self.keep, ranked)})

    def change(self, program: Program, layer: Layer, stats: LayerStats) -> Change:
        return drop_experts(
            program, layer, self.experts_to_keep(layer, self.worth(program, layer, stats))
        )

    def experts_to_keep(self, layer: Layer, worth: torch.Tensor) -> list[int]:
        """The experts with the greatest worth [E], in rising order: equally many of each router
        group. Of equal ones, the lower id is kept.

        Raises NoMatch if all experts would be kept, or if too few would remain for the router.
        """
        routing, share = layer.routing, f"keep={self.keep:g} of {layer.count} experts is"
        count = round(self.keep * layer.count)
        each, rest = divmod(count, routing.groups)
        if count == layer.count:
            raise NoMatch(f"{share} all of them: nothing would change")
        if rest:
            raise NoMatch(f"{share} {count}, which {routing.groups} groups cannot share evenly")
        if lack := shortage(layer, each):
            raise NoMatch(f"{share} {count}, {lack}")
        return best_experts(layer, worth, each)

    def worth(self, program: Program, layer: Layer, stats: LayerStats) -> torch.Tensor:
        """The worth of each expert relative to the mean of its layer: f64[E]. For by=error, it is
        the error of the layer's output without the expert, relative to the norm of the output."""
        if self.by == "error":
            return eliminate_experts(program, layer, stats)
        if self.by == "random":
            # The layer's name in the seed gives each layer other numbers, independent of the order
            # of layers.
            generator = torch.Generator().manual_seed(self.seed + sum(layer.name.encode()))
            worth = torch.rand(layer.count, generator=generator)
        else:
            worth = stats.usage(layer.count) if self.by == "usage" else stats.saliency(layer.count)
        worth = worth.double()
        return worth / worth.mean().clamp(min=1e-30)


@dataclass(frozen=True, eq=False)
class PruneByPlan:
    """For each layer (by its output), the experts to keep, or the reason why the layer is
    unchanged."""

    inner: PruneExperts
    plan: Mapping[Value, list[int] | str]
    name: ClassVar[str] = PruneExperts.name
    source: ClassVar[str] = PruneExperts.source

    def change(self, program: Program, layer: Layer, stats: LayerStats) -> Change:
        experts = self.plan[layer.output]
        if isinstance(experts, str):
            raise NoMatch(experts)
        return drop_experts(program, layer, experts)


def drop_experts(program: Program, layer: Layer, experts: Sequence[int]) -> Change:
    """The program in which the layer has only `experts`."""
    says = f"keeps {', '.join(map(str, experts))} of {layer.count}"
    changed = restrict_experts(program, layer, experts)
    return Change(changed, tuple((expert,) for expert in experts), says)


def best_experts(layer: Layer, worth: torch.Tensor, each: int) -> list[int]:
    """The `each` experts with the greatest worth of each group, in rising order."""
    worth = worth.reshape(layer.routing.groups, -1)
    order = torch.sort(worth, descending=True, stable=True).indices[:, :each]
    first = torch.arange(layer.routing.groups)[:, None] * worth.shape[1]
    return sorted((order + first).flatten().tolist())


def shortage(layer: Layer, each: int) -> str:
    """The reason why `each` experts per group are too few for the router; empty if they suffice."""
    routing = layer.routing
    if each * min(routing.top_groups, routing.groups) < routing.k:
        where = "" if routing.groups == 1 else f" from {routing.top_groups} groups of {each}"
        return f"and each token needs {routing.k}{where}"
    if routing.groups > 1 and routing.group_score == "top2sum" and each < 2:
        return "one in each group, and groups are scored by their best two"
    return ""


def rank_experts(
    keep: float, layers: Sequence[tuple[Layer, torch.Tensor]]
) -> dict[Value, list[int] | str]:
    """The experts to keep of each layer if the experts of all layers are ranked by worth, [E] each;
    or the reason why a layer keeps all.

    Each group of a router keeps equally many: the n-th best experts of all groups are one entry of
    the ranking, with their mean worth.
    """
    total = sum(layer.count for layer, _ in layers)
    count = round(keep * total)
    share = f"keep={keep:g} of all {total} experts is"
    each = []
    for layer, _ in layers:
        size = layer.count // layer.routing.groups
        each.append(next((n for n in range(1, size) if not shortage(layer, n)), size))
    needed = sum(n * layer.routing.groups for n, (layer, _) in zip(each, layers, strict=True))
    if count == total or count < needed:
        why = (
            "all of them: nothing would change"
            if count == total
            else f"{count}, and their routers need {needed}"
        )
        return {layer.output: f"{share} {why}" for layer, _ in layers}
    candidates = []
    for i, (layer, worth) in enumerate(layers):
        levels = worth.reshape(layer.routing.groups, -1).sort(descending=True).values.mean(0)
        candidates += [(-value, i, n) for n, value in enumerate(levels.tolist()) if n >= each[i]]
    left = count - needed
    for _, i, n in sorted(candidates):
        groups = layers[i][0].routing.groups
        if groups <= left and n == each[i]:
            each[i], left = n + 1, left - groups
    return {
        layer.output: f"its {layer.count} experts are among the best {count} of all {total}"
        if n * layer.routing.groups == layer.count
        else best_experts(layer, worth, n)
        for n, (layer, worth) in zip(each, layers, strict=True)
    }
