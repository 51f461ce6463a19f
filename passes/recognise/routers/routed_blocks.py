"""Recognised blocks as their routers see them: the choices and weights that they read, or earlier
ones, which these are computed from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

from moec.dtypes import FLOATS, INDEX_DTYPES
from moec.ir.graph import Op, Value
from moec.ir.ops.experts.dispatch import chooses_all
from moec.ir.sizes.dims import product
from moec.ir.traits import CHOICES
from moec.passes.recognise.region import Scope, choices, routing_behind

Key = tuple[Value | None, Value]
"""Weights, if a block reads any, and experts."""


@dataclass(frozen=True)
class Routed:
    """A recognised block as its router sees it."""

    dispatch: Op
    experts: Value  # [T, k], before any capacity
    weights: Value | None  # [T, k]
    num_experts: int
    ends: tuple[tuple[Op, int], ...]  # where the block reads what is computed from these
    ordered: bool = False  # results of choices are not summed: the order of slots matters

    @property
    def key(self) -> Key:
        return self.weights, self.experts


def read_before(scope: Scope, block: Routed, key: Key) -> tuple[Op, ...]:
    """The ops from choices and weights to those that the block reads."""
    ends = [op.inputs[index] for op, index in block.ends]
    return scope.upstream(ends, [value for value in key if value is not None])


def readers(scope: Scope, block: Routed) -> Iterator[Op]:
    """The ops that read the choices or weights for the block."""
    for op in (*read_before(scope, block, block.key), *(op for op, _ in block.ends)):
        if {*block.key} & {*op.inputs}:
            yield op


def earlier_choices(scope: Scope, block: Routed) -> Iterator[Routed]:
    """The block with choices and weights that its own are computed from without choosing again,
    as by a scale of each expert. Weights nearest to the block first, at last none."""
    ends = [op.inputs[index] for op, index in block.ends]
    count, moves = product(block.experts.shape), routing_behind(scope, ends, 200, stops=CHOICES)
    behind = [value for value in moves if product(value.shape) == count]
    experts = [v for v in behind if v.dtype in INDEX_DTYPES and scope.made_by(v, *CHOICES)]
    weights = [v for v in behind if v.dtype in FLOATS] if block.weights is not None else []
    for key in itertools.product((*weights, None), experts):
        again = {*choices(scope, [key[1]])} & {*read_before(scope, block, key)}
        if key != block.key and not again:
            yield replace(block, weights=key[0], experts=key[1], ordered=True)


def blocks(scope: Scope) -> Iterator[Routed]:
    for op in scope.graph.ops:
        if op.name != "moe.dispatch" or chooses_all(scope.graph, op):
            continue
        reader, position = chooser(scope, op)
        experts = reader.inputs[position]
        ends = [(reader, position)]
        weights, slots = None, None
        if len(op.inputs) > 2:
            weights = op.inputs[2]
            ends.append((op, 2))
        for combine in scope.graph.readers.get(op.outputs[1], ()):
            if combine.name == "moe.combine":
                slots = combine.attrs["k"]
                if combine.attrs.get("weighted"):
                    weights = combine.inputs[2]
                    ends.append((combine, 2))
        for zero in scope.graph.readers[op.inputs[1]]:
            if zero.name == "moe.zero_experts":
                ends += [(zero, 1)] if reader is op else []  # else after a capacity
                ends += [(zero, 2)] if weights is not None else []
        source = scope.source_of(experts, {"aten.reshape.default"})
        if _is_choices(source) and (weights is None or source.shape == weights.shape):
            experts = source  # the same choices with another number of slots per row
        groups = each_group(scope, experts)
        weighed = None if weights is None else each_group(scope, weights)
        if groups is not None and (weights is None or weighed is not None):
            experts, weights = groups, weighed
        ordered = {slots, op.inputs[1].shape[-1]} != {experts.shape[-1]}
        count = cast(int, op.attrs["num_experts"])
        yield Routed(op, experts, weights, count, tuple(ends), ordered)


def each_group(scope: Scope, value: Value) -> Value | None:
    """The values [.., k] that consecutive rows share, if `value` repeats one for each of them."""
    repeats = scope.made_by(scope.source_of(value, {"aten.reshape.default"}), "aten.expand.default")
    if repeats is None:
        return None
    shaped = scope.made_by(repeats.inputs[0], "aten.reshape.default")
    values = (repeats.inputs[0], *(() if shaped is None else shaped.inputs))
    return next((value for value in reversed(values) if _is_choices(value)), None)


def chooser(scope: Scope, dispatch: Op) -> tuple[Op, int]:
    """The op that reads the choices before any capacity, and the index of that input. A capacity
    may sort the choices into another order first and restore it afterwards."""
    back = scope.made_by(dispatch.inputs[1], "aten.index.Tensor")
    drop = scope.made_by(back.inputs[0] if back else dispatch.inputs[1], "moe.capacity")
    if drop is None:
        return dispatch, 1
    ordered = scope.made_by(drop.inputs[0], "aten.index.Tensor") if back else None
    return ordered or drop, 0


def _is_choices(value: Value) -> bool:
    """Whether `value` is [T, k]. A choice per token of each text, [B, S], is not: S is a named
    size."""
    return len(value.shape) == 2 and isinstance(value.shape[1], int)
