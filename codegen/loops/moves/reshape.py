"""Ops that give the same elements another shape."""

from __future__ import annotations

from collections.abc import Sequence

from moec.codegen.loops import index as ix
from moec.codegen.loops.emission import Point
from moec.codegen.loops.index import Index
from moec.codegen.loops.rules import EMIT, LoopRule
from moec.codegen.loops.scalars import Scalar
from moec.ir.graph import Op
from moec.ir.sizes.dims import Dim, product


def _parts(before: Sequence[Dim], after: Sequence[Dim]) -> list[tuple[list[int], list[int]]]:
    """Pairs of runs of axes that hold the same elements, split where the products of sizes
    agree."""

    def prefixes(shape: Sequence[Dim]) -> list[Dim]:
        products: list[Dim] = [1]
        for dim in shape:
            products.append(product((products[-1], dim)))
        return products

    old, new = prefixes(before), prefixes(after)
    parts: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        ends = next(
            (
                (a, b)
                for a in range(i, len(before) + 1)
                for b in range(j, len(after) + 1)
                if (a, b) != (i, j) and old[a] == new[b] and old[a] != 0
            ),
            (len(before), len(after)),
        )
        parts.append((list(range(i, ends[0])), list(range(j, ends[1]))))
        i, j = ends
    return parts


def only_splits(op: Op) -> bool:
    """Whether each old axis is split into new axes only: then positions need no division."""
    before, after = op.inputs[0].shape, op.outputs[0].shape
    return all(sum(before[a] != 1 for a in axes) <= 1 for axes, _ in _parts(before, after))


def reshaped(p: Point) -> Scalar:
    value = p.op.inputs[0]
    if p.emission.flat or value.shape == p.value.shape:
        return p.read(value, p.at)
    at: list[Index] = [ix.const(0)] * len(value.shape)
    for old, new in _parts(value.shape, p.value.shape):
        flat = ix.const(0)
        for axis in new:
            flat = ix.add(ix.mul(flat, p.size(p.value.shape[axis])), p.at[axis])
        live = [axis for axis in old if value.shape[axis] != 1]
        for position, axis in reversed(list(enumerate(live))):
            size = p.size(value.shape[axis])
            at[axis] = flat if position == 0 else ix.mod(flat, size)
            flat = flat if position == 0 else ix.div(flat, size)
    return p.read(value, tuple(at))


for _name in (
    "view",
    "_unsafe_view",
    "reshape",
    "flatten.using_ints",
    "unflatten.int",
    "unsqueeze",
    "squeeze",
    "squeeze.dim",
    "squeeze.dims",
    "view_copy",
    "unsqueeze_copy",
    "clone",
    "alias",
    "detach",
    "lift_fresh_copy",
    "contiguous",
):
    _full = f"aten.{_name}" if "." in _name else f"aten.{_name}.default"
    EMIT[_full] = LoopRule(point=reshaped, view=True, cost=0, same_position=False, exact=True)
