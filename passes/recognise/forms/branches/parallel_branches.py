"""Concatenated results of experts, from branches written out one by one.

    cat([expert_0(x), expert_1(x), …])                    every expert for every token
    cat([linear(a, w[0]) for a in rows.split(sizes)])     each expert for its own rows
    cat([expert_0(rows[0]), expert_1(rows[1]), …])        each expert for one index of an axis of
                                                          the rows
    y[ids == 0] = expert_0(rows[ids == 0]), …             each expert for its own rows, in place

Such a concatenation computes a product with stacked weights, and is read as that product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from moec.dtypes import FLOATS
from moec.errors import NoMatch
from moec.ir.graph import Op, Value
from moec.passes.recognise.forms.branches.unrolled_experts import (
    Branch,
    cone,
    family,
    read_branch,
    signature,
)
from moec.passes.recognise.reading.body_writer import Fan
from moec.passes.recognise.region import Scope

_SPLIT = "aten.split_with_sizes.default"
_PART = "aten.select.int"


def fan(scope: Scope, op: Op) -> Fan | None:
    """The fan that a concatenation ends; None unless its operands are branches of one kind.

    Raises NoMatch if the branches differ in more than their weights, or read different rows.
    """
    if op.name != "aten.cat.default" or len(op.inputs) < 2:
        return None
    cones = [cone(scope, v) for v in op.inputs[:2]]
    kinds = {signature(scope, c) for c in cones}
    if len(kinds) > 1 or None in kinds:
        return None
    cones += [cone(scope, v) for v in op.inputs[2:]]
    parts = [part_of_rows(scope, ops) for ops in cones]
    if in_order(parts):
        cones = [
            tuple(o for o in ops if o is not part) for ops, part in zip(cones, parts, strict=True)
        ]
    branches = [read_branch(scope, v, c) for v, c in zip(op.inputs, cones, strict=True)]
    sources = [cast(Value, b.reader.x) for b in branches]
    if in_order(parts):
        return of(scope, branches, cast(Op, parts[0]).inputs[0], one_expert_per_row=True)
    split = scope.made_by(sources[0], _SPLIT)
    if split is not None and split.outputs == tuple(sources):
        x = split.inputs[0]
        return of(
            scope, branches, x, one_expert_per_row=True, split=split if by_data(split) else None
        )
    if len({b.reader.root for b in branches}) == 1:
        return of(scope, branches, sources[0], one_expert_per_row=False)
    if split is None:
        return None
    raise NoMatch(f"its branches read different rows: {sources[0].name}, {sources[1].name}")


def of(
    scope: Scope,
    branches: Sequence[Branch],
    x: Value,
    one_expert_per_row: bool,
    split: Op | None = None,
) -> Fan:
    """Raises NoMatch if the branches differ in more than their weights."""
    experts = family(scope, branches)
    first = experts.first
    axes = first.reader.writer.in_order(first.layout).axes
    return Fan(
        x,
        first.body,
        experts.stacks,
        len(branches),
        axes,
        first.reader.uses,
        one_expert_per_row,
        split,
    )


def part_of_rows(scope: Scope, ops: Sequence[Op]) -> Op | None:
    """The op that selects one expert's rows, x[e] of x[E, .., D] or x[:, e] of x[.., E, .., D]: a
    select, or a slice of length 1."""
    for op in ops:
        if number_of_part(op) is not None and op.inputs[0] not in scope.constants:
            x = op.inputs[0]
            if len(x.shape) > 2 and x.dtype in FLOATS and axis_of(op) < len(x.shape) - 1:
                return op
    return None


def axis_of(part: Op) -> int:
    """The axis that `part` selects from."""
    return cast(int, part.attrs.get("dim", 0)) % len(part.inputs[0].shape)


def number_of_part(op: Op) -> int | None:
    """The index that the op selects from an axis; None if it does not select exactly one."""
    if op.name == _PART:
        return cast(int, op.attrs["index"])
    start = op.attrs.get("start", 0)
    one = op.name == "aten.slice.Tensor" and op.outputs[0].shape[axis_of(op)] == 1
    return start if one and isinstance(start, int) else None


def in_order(parts: Sequence[Op | None]) -> bool:
    """Whether the parts are x[0], x[1], … up to the last index of one value x."""
    selects = [part for part in parts if part is not None]
    return (
        len(selects) == len(parts)
        and {(part.inputs[0], axis_of(part)) for part in selects}
        == {(selects[0].inputs[0], axis_of(selects[0]))}
        and selects[0].inputs[0].shape[axis_of(selects[0])] == len(selects)
        and [number_of_part(part) for part in selects] == list(range(len(selects)))
    )


def by_data(split: Op) -> bool:
    """Whether the sizes of the parts depend on data."""
    sizes = cast("tuple[object, ...]", split.attrs["split_sizes"])
    return not all(isinstance(size, int) for size in sizes)
