"""Edits of a router's columns, one per expert: a subset, more columns, or merged columns.

    logits = aten.linear(x, w[E, D], b[E]?)        logits = aten.linear(x, w[kept], b[kept]?)
    weights, ids = moe.route(logits)          ->   weights, ids = moe.route(logits)

Where the logits do not come from a linear layer with a stored weight, columns are selected from
the logits instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moec.errors import NoMatch
from moec.ir.graph import Op, Program, TensorType, Value
from moec.ir.sizes.dims import Dim
from moec.passes.core.moe_layer import MOVES, Layer, Splice, constant


def keep_columns(splice: Splice, layer: Layer, experts: Sequence[int]) -> None:
    """Route over the columns of `experts` only, in that order: the same choices and weights as
    with all other columns masked to minus infinity."""
    program = splice.program
    index = torch.tensor(list(experts))
    logits, *correction = layer.route.inputs
    ops: list[Op] = []
    behind = logits_linear(program, logits)
    if behind is None:
        logits = _select_columns(splice, layer, logits, index, 1, ops)
    else:
        logits = with_weights(
            splice, behind, [constant(program, v)[index] for v in behind[0].inputs[1:]], ops
        )
    inputs = [logits]
    for value in correction:
        try:
            inputs.append(splice.weight(value.name, constant(program, value)[index]))
        except NoMatch:
            inputs.append(_select_columns(splice, layer, value, index, 0, ops))
    splice.put(layer.route, [*ops, replace(layer.route, inputs=tuple(inputs))])


def add_columns(splice: Splice, layer: Layer, count: int, generator: torch.Generator) -> None:
    """Route over `count` more columns of random weights, whose bias (and correction, where there
    is one) is minus infinity: the scores of the old columns do not change, and of equal scores the
    lower id wins.

    Raises NoMatch for a router with expert groups or with scores relative to the greatest logit,
    and for logits that come from no linear layer.
    """
    program, routing = splice.program, layer.routing
    if routing.groups > 1:
        raise NoMatch("the router chooses among groups of experts, which are of one size")
    if routing.score == "sparsemixer":
        raise NoMatch("the router's scores depend on which logits are near the greatest")
    logits, *correction = layer.route.inputs
    ops: list[Op] = []
    behind = logits_linear(program, logits)
    if behind is None:
        raise NoMatch("the logits are not the output of a linear layer with its own weight")
    weight, *bias = [constant(program, v) for v in behind[0].inputs[1:]]
    rows = torch.randn(count, weight.shape[1], generator=generator) * weight.float().std()
    never = torch.full((count,), -torch.inf)
    old = bias[0] if bias else torch.zeros(len(weight), dtype=weight.dtype)
    weights = [_append_rows(weight, rows), _append_rows(old, never)]
    inputs = [with_weights(splice, behind, weights, ops)]
    for value in correction:
        inputs.append(splice.weight(value.name, _append_rows(constant(program, value), never)))
    splice.put(layer.route, [*ops, replace(layer.route, inputs=tuple(inputs))])


def _append_rows(tensor: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, more.to(tensor.dtype)])


def merge_columns(splice: Splice, layer: Layer, groups: Sequence[Sequence[int]]) -> None:
    """Route over groups of columns, each with the sum of its members' probabilities.

    Raises NoMatch for a router whose scores are not a softmax, or are corrected or grouped.
    """
    routing = layer.routing
    if routing.score != "softmax" and (routing.score, routing.after) != ("none", "softmax"):
        raise NoMatch(f"the router's scores are {routing.score}, whose sum is not constant")
    if len(layer.route.inputs) > 1 or routing.groups > 1:
        raise NoMatch("the router corrects its scores, or chooses among groups of experts")
    logits, route = layer.route.inputs[0], layer.route
    members = torch.zeros(len(groups), layer.count, dtype=torch.bool)  # a constant, not a parameter
    for row, group in enumerate(groups):
        members[row, list(group)] = True
    ops: list[Op] = []
    wide = splice.cast(ops, logits, "f32", route)
    share = splice.emit(ops, "aten.softmax.int", (wide,), wide.type, route, dim=-1)
    type = TensorType("f32", (logits.shape[0], len(groups)))
    matrix = splice.weight(f"{route.origin or logits.name}.members", members)
    matrix = splice.cast(ops, matrix, "f32", route)
    mass = splice.emit(ops, "aten.linear.default", (share, matrix), type, route)
    score = splice.emit(ops, "aten.log.default", (mass,), type, route)
    splice.put(route, [*ops, replace(route, inputs=(score,))])


def logits_linear(program: Program, logits: Value) -> tuple[Op, ...] | None:
    """The linear layer of the logits and the data movements after it, in order; None if the
    logits come from another op, or the weights are computed or not one row per expert."""
    chain: list[Op] = []
    op = program.graph.producers.get(logits)
    while op is not None and op.name in MOVES:
        chain.insert(0, op)
        op = program.graph.producers.get(op.inputs[0])
    if op is None or op.name != "aten.linear.default":
        return None
    if any(v not in program.graph.params for v in op.inputs[1:]):
        return None
    if any(v.shape[:1] != logits.shape[1:] for v in op.inputs[1:]):
        return None
    if any(move.outputs[0].shape[-1:] != logits.shape[1:] for move in chain):
        return None
    return (op, *chain)


def with_weights(
    splice: Splice, behind: Sequence[Op], weights: Sequence[torch.Tensor], ops: list[Op]
) -> Value:
    """The logits of the layer with other weights [E', D] and biases [E'], after the same data
    movements. Appends the ops that compute them to `ops`."""
    linear, *moves = behind
    count = len(weights[0])
    params = [
        splice.weight(value.name, tensor)
        for value, tensor in zip(linear.inputs[1:], weights, strict=False)
    ]
    params += [splice.weight(f"{linear.origin}.bias", t) for t in weights[len(params) :]]
    value = linear.inputs[0]
    for op in (linear, *moves):
        (old,) = op.outputs
        shape: tuple[Dim, ...] = (*old.shape[:-1], count)
        new = splice.value(old.name, TensorType(old.dtype, shape))
        attrs = {**op.attrs, "shape": shape} if "shape" in op.attrs else op.attrs
        inputs = (value, *params) if op is linear else (value,)
        ops.append(replace(op, inputs=inputs, outputs=(new,), attrs=attrs))
        value = new
    return value


def _select_columns(
    splice: Splice, layer: Layer, value: Value, index: torch.Tensor, axis: int, ops: list[Op]
) -> Value:
    shape = (*value.shape[:axis], len(index))
    inputs = (value, splice.weight(f"{layer.route.origin or value.name}.kept", index))
    type = TensorType(value.dtype, shape)
    return splice.emit(ops, "aten.index_select.default", inputs, type, layer.route, dim=axis)
