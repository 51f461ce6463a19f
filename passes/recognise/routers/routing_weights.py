"""The weights of a region's choices: values that may hold them, and recipes for weights [T, k]."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import cast

from moec.dtypes import FLOATS
from moec.ir.graph import Attr, TensorType, Value
from moec.ir.sizes.dims import Dim, product
from moec.ir.traits import THROUGH, VIEWS, rounds_doubles
from moec.passes.proof.input_generators import Ids
from moec.passes.recognise.reading.layout import divide
from moec.passes.recognise.region import (
    Recipe,
    RegionEmitter,
    Scope,
    is_routing,
    routing_behind,
)
from moec.passes.recognise.routers.evidence import Evidence
from moec.passes.recognise.routers.expert_ids import Chosen, repeated

_LISTS = VIEWS | {"aten.nonzero.default", "aten.slice.Tensor"}
_NEAREST = 5
"""For weights with one value per slot: every ordering of so many nearest values is tried."""


def weightings(
    scope: Scope, evidence: Evidence, ids: Chosen, slots: int
) -> Iterator[tuple[Value | None, Recipe | None]]:
    """Ways to weight the choices: a value of the region that holds the weights, and the recipe for
    [T, k]."""
    used = evidence.values("weights", "mix")
    if not used:
        yield None, None
        return
    shape = (evidence.rows_out, slots)
    for value in candidates(scope, used, product((ids.per_row, evidence.rows_in))):
        yield value, _reshaped(value, shape)
    groups = divide(evidence.rows_in, ids.shared) if ids.shared != 1 else None
    if groups is not None:
        for value in candidates(scope, used, product((ids.per_row, groups))):
            yield value, _repeated(value, ids, evidence.rows_in, shape)
    if len(ids.values) > 1:
        singles = list(candidates(scope, used, evidence.rows_in))
        for group in _groups(singles, len(ids.values)):
            yield None, _side_by_side(group, evidence.rows_in)
    if isinstance(ids.feed, Ids):
        for dense in dense_weights(scope, used, evidence):
            yield None, _at_ids(dense, ids, evidence, shape)
    yield None, None  # weights of 1, or a mask that multiplies like a weight


def candidates(scope: Scope, used: Sequence[Value], count: Dim) -> Iterator[Value]:
    """Float values of `count` elements behind the weights, reached through routing ops. Sources
    that were only rearranged come first, farthest first; then the others, nearest first."""
    moved: list[Value] = []
    yielded: set[Value] = set()
    for value in used:
        while True:
            if value.dtype in FLOATS and product(value.shape) == count:
                moved.append(value)
            op = scope.maker(value)
            if op is None or rounds_doubles(op):
                break
            if op.name not in (
                *THROUGH,
                "aten.index.Tensor",
                "aten.index_select.default",
                "aten.slice.Tensor",
                "aten.gather.default",
            ):
                break
            value = op.inputs[0]
    for value in reversed(moved):
        if value not in yielded:
            yielded.add(value)
            yield value
    stack, visited = list(used), set(used)
    others: list[Value] = []
    while stack and len(visited) < 300:
        op = scope.maker(stack.pop())
        if op is None or not is_routing(op) or rounds_doubles(op):
            continue
        for value in (*op.inputs, *op.outputs):
            if value in visited and value not in used:
                continue
            if value.dtype in FLOATS and product(value.shape) == count and value not in yielded:
                others.append(value)
            if value in op.inputs and value not in visited:
                visited.add(value)
                stack.append(value)
    for value in sorted(dict.fromkeys(others), key=lambda v: -_position(scope, v))[:8]:
        if value not in yielded:
            yielded.add(value)
            yield value


def _position(scope: Scope, value: Value) -> int:
    maker = scope.maker(value)
    return -1 if maker is None else scope.position[maker]


def _groups(values: Sequence[Value], length: int) -> Iterator[tuple[Value, ...]]:
    """Tuples of values that each weight one slot: neighbours in both orders, then any ordered
    choice among the nearest."""
    groups: dict[tuple[Value, ...], None] = {}
    for start in range(len(values) - length + 1):
        group = tuple(values[start : start + length])
        groups |= {tuple(reversed(group)): None, group: None}
    groups |= dict.fromkeys(itertools.permutations(values[:_NEAREST], length))
    yield from groups


def _reshaped(value: Value, shape: tuple[Dim, ...]) -> Recipe:
    return lambda emit: emit.reshape(emit.old(value), shape)


def _repeated(value: Value, ids: Chosen, rows: Dim, shape: tuple[Dim, ...]) -> Recipe:
    def make(emit: RegionEmitter) -> Value:
        return emit.reshape(repeated(emit, emit.old(value), ids.shared, (rows, ids.per_row)), shape)

    return make


def _side_by_side(values: Sequence[Value], rows: Dim) -> Recipe:
    return lambda emit: emit.stack([emit.reshape(emit.old(v), (rows,)) for v in values], 1)


def dense_weights(scope: Scope, used: Sequence[Value], evidence: Evidence) -> Iterator[Value]:
    """Dense weights: [.., E] or [E, T] for every expert, or [T, E, C] for every capacity slot."""
    full = product((evidence.rows_in, evidence.experts))
    dense: dict[Value, None] = {}
    for value in routing_behind(scope, used, 120):
        if value.dtype in FLOATS:
            if value.shape[-1:] == (evidence.experts,) and product(value.shape) == full:
                dense[value] = None
            elif value.shape == (evidence.experts, evidence.rows_in):
                dense[value] = None
            elif (
                len(value.shape) == 3
                and value.shape[1] == evidence.experts
                and value.shape[0] == evidence.rows_in
            ):
                dense[value] = None
    # Two axes before three, then the farthest from the result first: this leaves fewer ops to the
    # router.
    yield from sorted(list(dense)[:6], key=lambda v: (len(v.shape) == 3, _position(scope, v)))


def unweighted_dropped(experts: Recipe, weights: Recipe, count: int) -> Recipe:
    """The ids [T, k], with `count`, which is no expert, where the weight is zero: such a row has no
    position in the experts' buffers."""

    def make(emit: RegionEmitter) -> Value:
        ids, weight = experts(emit), weights(emit)
        zero = TensorType("bool", weight.shape)
        (dropped,) = emit("aten.eq.Scalar", [weight], [zero], attrs={"other": 0})
        attrs: dict[str, Attr] = {"value": count}
        return emit("aten.masked_fill.Scalar", [ids, dropped], [ids.type], attrs=attrs)[0]

    return make


Condition = tuple[str, float]
"""A comparison of weights with a number: an ATen op, and the number."""
_COMPARISONS = {f"aten.{name}.Scalar" for name in ("gt", "ge", "lt", "le")}


def conditions(scope: Scope, evidence: Evidence) -> tuple[Condition, ...]:
    """The comparisons of floats with a number that decide which rows an expert reads."""
    numbers: dict[Condition, None] = {}
    for value in evidence.values("order", "mask"):
        op = scope.made_by(scope.source_of(value, _LISTS), *_COMPARISONS)
        if op is not None and op.inputs[0].dtype in FLOATS:
            numbers[op.name, cast(float, op.attrs["other"])] = None
    return tuple(numbers)


def unfulfilled_dropped(
    experts: Recipe, weights: Recipe, condition: Condition, count: int
) -> Recipe:
    """The ids [T, k], with `count`, which is no expert, where the weight does not fulfil a
    condition."""
    name, other = condition

    def make(emit: RegionEmitter) -> Value:
        ids, weight = experts(emit), weights(emit)
        flags = TensorType("bool", weight.shape)
        (fulfilled,) = emit(name, [weight], [flags], attrs={"other": other})
        (dropped,) = emit("aten.logical_not.default", [fulfilled], [flags])
        attrs: dict[str, Attr] = {"value": count}
        return emit("aten.masked_fill.Scalar", [ids, dropped], [ids.type], attrs=attrs)[0]

    return make


def _at_ids(dense: Value, ids: Chosen, evidence: Evidence, shape: tuple[Dim, ...]) -> Recipe:
    def make(emit: RegionEmitter) -> Value:
        value = emit.old(dense)
        if len(value.shape) == 3 and value.shape[-1] != evidence.experts:
            target = TensorType(value.dtype, value.shape[:2])
            (value,) = emit("aten.sum.dim_IntList", [value], [target], attrs={"dim": (2,)})
        if value.shape[-1] != evidence.experts:
            value = emit.permute(value, (1, 0))
        value = emit.reshape(value, (evidence.rows_in, evidence.experts))
        index = ids.recipe(emit)
        target = TensorType(value.dtype, index.shape)
        (value,) = emit("aten.gather.default", [value, index], [target], attrs={"dim": 1})
        return emit.reshape(value, shape)

    return make
