"""Experts' results side by side, from branches written out one by one.

    cat([expert_0(x), expert_1(x), …])                    every expert for every token
    cat([linear(a, w[0]) for a in rows.split(sizes)])     each expert for its own rows

Either is what a product with a stack of weights would give, and is read as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from moec.errors import NoMatch
from moec.ir import Graph, Op, Value
from moec.passes.recognise.block import Recipe
from moec.passes.recognise.branches import cone, family, read_branch, signature
from moec.passes.recognise.layout import Axis
from moec.passes.recognise.region import Scope

_SPLIT = "aten.split_with_sizes.default"


@dataclass(frozen=True)
class Fan:
    """`body` of each expert over `x`; `split` cuts x's rows by expert, or is None."""

    x: Value
    split: Op | None
    body: Graph
    stacks: tuple[Recipe, ...]
    experts: int
    axes: tuple[Axis, ...]  # of one branch
    uses: dict[str, list[Value]]


def fan(scope: Scope, op: Op) -> Fan | None:
    """The fan that a concatenation is, if its parts are branches of one kind.

    Raises NoMatch where they are, but are not equal experts over the same rows.
    """
    if op.name != "aten.cat.default" or len(op.inputs) < 2:
        return None
    cones = [cone(scope, v) for v in op.inputs[:2]]
    kinds = {signature(scope, c) for c in cones}
    if len(kinds) > 1 or None in kinds:
        return None
    cones += [cone(scope, v) for v in op.inputs[2:]]
    branches = [read_branch(scope, v, c) for v, c in zip(op.inputs, cones, strict=True)]
    sources = [cast(Value, b.reader.x) for b in branches]
    split = scope.made_by(sources[0], _SPLIT)
    found = family(scope, branches)
    if split is not None and split.outputs == tuple(sources):
        x = split.inputs[0]
    elif len({b.reader.root for b in branches}) == 1:
        x, split = sources[0], None
    elif split is None:
        return None
    else:
        raise NoMatch(f"its branches read different rows: {sources[0].name}, {sources[1].name}")
    layout = found.first.reader.writer.in_order(found.first.layout)
    uses = found.first.reader.uses
    return Fan(x, split, found.first.body, found.stacks, len(branches), layout.axes, uses)
