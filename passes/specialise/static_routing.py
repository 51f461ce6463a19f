"""A layer whose choices are known becomes dense; experts that no token can reach are dropped.

rows, order, ends = moe.dispatch(x, ids)   ids is [2, 0] for every token
out = moe.experts(rows, ends, w1, w2) {…}
y = moe.combine(out, order, w)         ->  y = w[:, 0] * ffn_2(x) + w[:, 1] * ffn_0(x)

t = aten.add(logits, mask)                 mask is [0, -inf, 0, -inf]
w, ids = moe.route(t)                  ->  w, ids = moe.route(t[:, [0, 2]])
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch

from moec.errors import NoMatch
from moec.ir.graph import Attr, DType, Op, Program, TensorType, Value
from moec.passes.core.inline import inline_body
from moec.passes.core.moe_layer import MOVES, Layer, Splice, constant, select_experts
from moec.passes.core.router_columns import keep_columns

Constants = Mapping[Value, torch.Tensor]


def densify(program: Program, experts: Op, chosen: list[int], constants: Constants) -> Program:
    """The program with a layer's experts as dense layers; `chosen` are the k experts of each token.

    Raises NoMatch if the rows have other readers, a choice is no expert, or the results of a
    token's experts stay apart.
    """
    graph = program.graph
    dispatch, body = graph.producers[experts.inputs[1]], experts.body
    readers = graph.readers.get(experts.outputs[0], ())
    if [op.name for op in readers] != ["moe.combine"]:
        raise NoMatch("the rows of the experts are read by more than one moe.combine")
    count = cast(int, dispatch.attrs["num_experts"])
    if not all(0 <= expert < count for expert in chosen):
        raise NoMatch(f"every token takes experts {chosen}, and there are {count}")
    assert body is not None
    (combine,) = readers
    if combine.attrs["k"] != len(chosen):
        raise NoMatch("the results of a token's experts are not summed")
    weights = combine.inputs[2] if combine.attrs.get("weighted") else None
    splice = Splice(program)
    ops: list[Op] = []
    total: Value | None = None
    for slot, expert in enumerate(chosen):
        x = dispatch.inputs[0]
        if len(dispatch.inputs) > 2:
            scale = _slot(splice, ops, dispatch.inputs[2], slot, constants, dispatch)
            scale = splice.cast(ops, scale, x.dtype, dispatch)
            x = splice.emit(ops, "aten.mul.Tensor", (x, scale), x.type, dispatch)
        params = {
            param: splice.weight(stack.name, constant(program, stack)[expert].clone())
            for param, stack in zip(body.params, experts.inputs[2:], strict=True)
        }
        body_ops, y = inline_body(splice, body, x, params, experts.origin)
        ops += body_ops
        y = splice.cast(ops, y, "f32", combine)
        if weights is not None and not _is_one(weights, slot, constants):
            scale = splice.cast(
                ops, _slot(splice, ops, weights, slot, constants, combine), "f32", combine
            )
            y = splice.emit(ops, "aten.mul.Tensor", (y, scale), y.type, combine)
        total = y if total is None else _sum(splice, ops, total, y, combine)
    assert total is not None
    if combine.attrs.get("added"):
        addend = splice.cast(ops, combine.inputs[-1], "f32", combine)
        total = _sum(splice, ops, total, addend, combine)
    total = splice.cast(ops, total, cast(DType, combine.attrs["dtype"]).name, combine)
    if ops[-1].outputs != (total,):
        splice.emit(ops, "aten.alias.default", (total,), total.type, combine)
    ops[-1] = replace(ops[-1], outputs=combine.outputs)
    splice.put(combine, ops)
    return splice.done()


def _sum(splice: Splice, ops: list[Op], a: Value, b: Value, like: Op) -> Value:
    return splice.emit(ops, "aten.add.Tensor", (a, b), a.type, like)


def _is_one(weights: Value, slot: int, constants: Constants) -> bool:
    return weights in constants and float(constants[weights][0, slot]) == 1.0


def _slot(
    splice: Splice, ops: list[Op], weights: Value, slot: int, constants: Constants, like: Op
) -> Value:
    """One column of the weights: [T, 1], or [1, 1] if it is the same for all tokens."""
    if weights in constants:
        return splice.weight(weights.name, constants[weights][:, slot : slot + 1].clone())
    if weights.shape[1] == 1:
        return weights
    type = TensorType(weights.dtype, (weights.shape[0], 1))
    cut: dict[str, Attr] = {"dim": 1, "start": slot, "end": slot + 1}
    return splice.emit(ops, "aten.slice.Tensor", (weights,), type, like, **cut)


# ---- unreachable experts ---------------------------------------------------------------


def restrict_experts(program: Program, layer: Layer, experts: Sequence[int]) -> Program:
    """The program in which the layer has only `experts` and their columns of the router."""
    splice = Splice(program)
    keep_columns(splice, layer, experts)
    select_experts(splice, layer, experts)
    return splice.done()


def reachable_experts(program: Program, layer: Layer, constants: Constants) -> list[int]:
    """The experts whose logits are not minus infinity for every token.

    All other logits are assumed to be finite. Raises NoMatch if the router may choose an expert
    whose logit is minus infinity.
    """
    columns = _columns(program, layer.route.inputs[0], constants)
    if columns is None or not (columns == -math.inf).any():
        return list(range(layer.count))
    experts = [int(e) for e in (columns != -math.inf).nonzero()[:, 0]]
    routing = layer.routing
    if len(layer.route.inputs) > 1:
        raise NoMatch(
            "the router adds a correction to its scores, after which -inf no longer "
            "excludes an expert"
        )
    if routing.groups > 1 or routing.score == "sparsemixer":
        what = "sparsemixer" if routing.groups == 1 else "groups of experts"
        raise NoMatch(f"the router chooses by {what}, not by the greatest logits alone")
    if len(experts) < routing.k:
        raise NoMatch(f"{len(experts)} experts can be chosen, and each token needs {routing.k}")
    return experts


def _columns(program: Program, value: Value, constants: Constants) -> torch.Tensor | None:
    """The row [E] that all rows of [.., E] equal, NaN in columns that differ or are not known."""
    if value in constants:
        return constants[value].reshape(-1, constants[value].shape[-1])[0].float()
    op = program.graph.producers.get(value)
    if op is None:
        return None
    if op.name in MOVES and op.inputs[0].shape[-1:] == value.shape[-1:]:
        return _columns(program, op.inputs[0], constants)
    if op.name == "aten.add.Tensor" and len(op.inputs) == 2 and op.attrs.get("alpha", 1) == 1:
        return _add_known([_row(program, v, value, constants) for v in op.inputs])
    fill = op.attrs.get("value")
    if op.name == "aten.masked_fill.Scalar" and isinstance(fill, int | float):
        return _fill_known(_row(program, op.inputs[1], value, constants), float(fill))
    if op.name == "aten.where.self" and len(op.inputs) == 3:
        condition, *sides = (_row(program, v, value, constants) for v in op.inputs)
        if condition is None:
            return None
        undefined = torch.full_like(condition.float(), math.nan)
        a, b = (undefined if side is None else side for side in sides)
        return torch.where(condition != 0, a, b)
    return None


def _row(
    program: Program, value: Value, target: Value, constants: Constants
) -> torch.Tensor | None:
    """`_columns` of an operand that is broadcast to the shape of `target`."""
    columns = _columns(program, value, constants)
    if columns is None and value in program.graph.params:
        tensor = program.weights[value.name].float()
        columns = tensor.reshape(-1) if tensor.numel() in (1, target.shape[-1]) else None
    return None if columns is None else columns.expand(int(cast(int, target.shape[-1])))


def _add_known(sides: list[torch.Tensor | None]) -> torch.Tensor | None:
    """A sum is known where both sides are, and minus infinity where one of them is."""
    known_sides = [side for side in sides if side is not None]
    if not known_sides:
        return None
    first, *others = known_sides
    total = first + others[0] if others else torch.full_like(first, math.nan)
    out = torch.stack([side == -math.inf for side in known_sides]).any(0)
    return torch.where(out, -math.inf, total)


def _fill_known(mask: torch.Tensor | None, fill: float) -> torch.Tensor | None:
    return None if mask is None else torch.where(mask != 0, fill, math.nan)
