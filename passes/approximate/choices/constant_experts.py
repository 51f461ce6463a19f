"""Experts of small effect give constants: a token that chooses one reads no network.

    w, ids = moe.route(logits)                   w, ids = moe.route(logits)
    … = moe.dispatch(x, ids) <8>           ->    slots = table[ids]      experts first: 0 .. 5
    y = moe.combine(…, w)                        … = moe.dispatch(x, slots) <6>
                                                 z = moe.zero_experts(x, slots, w, constants[2, D])
                                                 y = moe.combine(…, w) + z

Tokens are routed as before. The constant of an expert is the mean of its results over the tokens
that chose it, by the squares of the router's weights: of all vectors the one with the smallest
squared error in the layer's result. One that no token chose gives zero. (MoE++, arXiv 2410.07348,
has constant experts, which are trained.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from moec.ir.graph import Op, Program, Ref
from moec.passes.approximate.insert_zero_experts import (
    add_zero_experts,
    check_combinable,
    expert_results,
)
from moec.passes.calibration.evaluator import LayerStats
from moec.passes.core.moe_layer import Layer, Splice, constant, select_experts

ROWS = 4096  # rows of an expert that are computed at once


@dataclass(frozen=True, eq=False)
class ExpertConstants:
    """The constant of each expert, f32[E, D], and the squared error that it has in the layer's
    result, summed over the tokens of the data: f64[E]."""

    vectors: torch.Tensor
    errors: torch.Tensor


def expert_constants(
    program: Program, layer: Layer, stats: LayerStats, experts: Iterable[int]
) -> ExpertConstants:
    """The constants of `experts`; zeros for the others."""
    result_of = expert_results(program, layer)
    vectors = torch.zeros(layer.count, stats.x.shape[1])
    errors = torch.zeros(layer.count, dtype=torch.float64)
    for e in experts:
        rows, slots = (stats.experts == e).nonzero(as_tuple=True)
        if not len(rows):
            continue
        results = torch.cat([result_of(e, x) for x in torch.split(stats.x[rows], ROWS)]).double()
        squares = stats.weights[rows, slots].double().square()
        mean = squares @ results / squares.sum().clamp(min=1e-300)
        vectors[e] = mean.float()
        errors[e] = squares @ (results - mean).square().sum(-1)
    return ExpertConstants(vectors, errors)


def replace_by_constants(
    program: Program, layer: Layer, experts: Sequence[int], vectors: torch.Tensor
) -> Program:
    """The program in which the layer has only `experts`, and every other one gives its row of
    `vectors` [E, D]. Raises NoMatch where choices cannot go to experts without a network."""
    check_combinable(layer)
    others = [e for e in range(layer.count) if e not in set(experts) and bool(vectors[e].any())]
    order, count = [*experts, *others], len(experts)
    table = torch.full((layer.count + 1,), len(order))  # the rest, and no expert: zero
    table[order] = torch.arange(len(order))
    splice, ops = Splice(program), list[Op]()
    select_experts(splice, layer, experts)
    (dispatch,) = splice.replaced[layer.dispatch]
    ids = splice.cast(ops, dispatch.inputs[1], "i64", layer.route)
    slots = splice.emit(
        ops,
        "aten.index.Tensor",
        (splice.weight(f"{layer.name}.slots", table), ids),
        ids.type,
        layer.route,
        indices=(Ref(1),),
    )
    splice.put(layer.dispatch, [*ops, replace(dispatch, inputs=(dispatch.inputs[0], slots))])
    dtype = constant(program, layer.stacks[0]).dtype
    if others:
        constants = {"constants": vectors[others].to(dtype)}
        add_zero_experts(splice, layer, ("constant",) * len(others), constants, (slots, count))
    return splice.done()
