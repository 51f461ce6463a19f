"""The error of a layer's output on the calibration rows if experts are masked.

    y[t]              = sum_e c[t, e] f_e(x[t])       c: routing weights, 0 for unchosen experts
    |y'[t] - y[t]|^2  = d G d                         d = c'[t] - c[t]
    G[t, e, f]        = f_e(x[t]) . f_f(x[t])

All experts run once on all rows. Given the products G, the error of any set of masked experts needs
only the routing.
"""

from __future__ import annotations

import math

import torch

from moec.errors import NoMatch
from moec.ir.graph import Program
from moec.ops.routing.routing import Routing, route_logits
from moec.passes.calibration.evaluator import LayerStats
from moec.passes.core.moe_layer import MOVES, Layer, constant, expert_outputs

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
