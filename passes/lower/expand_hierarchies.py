"""Gates at two levels become one softmax over all groups, padded to one size.

    y = moe.hierarchy(r, c, w) <groups=(2, 3)>
    ->
    c' = reshape(cat(c[:, 0:2], -inf, c[:, 2:5]), [.., 2, 3])
    r' = reshape(cat(r[:, 0:2], 0, r[:, 2:5]), [.., 2, 3])
    y = sum(w * sum(softmax(c') * r'))

A separate softmax per group would need one loop per group. Padded elements have a weight of zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.ir.graph import Attr, DType, Op, Program, Ref, TensorType, Value
from moec.ir.ops.routing.gate import groups_of
from moec.ir.sizes.dims import Dim
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass
from moec.passes.lower.expand_soft_mixtures import softmax


@dataclass(frozen=True)
class ExpandHierarchies(Pass):
    """Write out gates at two levels: one softmax within all groups, and two sums."""

    name: ClassVar[str] = "expand-hierarchies"

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, expand, log), program.weights)


def expand(op: Op, b: Builder) -> Sequence[Value] | None:
    if op.name != "moe.hierarchy":
        return None
    values, logits, weights = op.inputs
    shares = softmax(padded(logits, -math.inf, op, b), len(logits.shape), op, b)
    return (weighted_sum(weighted_sum(padded(values, 0.0, op, b), shares, op, b), weights, op, b),)


def padded(value: Value, fill: float, op: Op, b: Builder) -> Value:
    """[.., E] as [.., G, M], M the size of the largest group."""
    groups = groups_of(op)
    widest, lead = max(groups), value.shape[:-1]
    shape = (*lead, len(groups), widest)
    if set(groups) == {widest}:
        return b.reshape(value, shape, like=op)
    parts: list[Value] = []
    start = end = 0
    for size in groups:
        end += size
        if size < widest or end == value.shape[-1]:
            parts.append(_slice(value, start, end, op, b))
            start = end
        if size < widest:
            parts.append(_full(value, (*lead, widest - size), fill, op, b))
    attrs: dict[str, Attr] = {"tensors": tuple(map(Ref, range(len(parts)))), "dim": len(lead)}
    flat = TensorType(value.dtype, (*lead, len(groups) * widest))
    (y,) = b.emit("aten.cat.default", parts, [flat], like=op, attrs=attrs)
    return b.reshape(y, shape, like=op)


def _slice(value: Value, start: int, end: int, op: Op, b: Builder) -> Value:
    attrs: dict[str, Attr] = {"dim": len(value.shape) - 1, "start": start, "end": end}
    part = TensorType(value.dtype, (*value.shape[:-1], end - start))
    return b.emit("aten.slice.Tensor", [value], [part], like=op, attrs=attrs)[0]


def _full(value: Value, shape: tuple[Dim, ...], fill: float, op: Op, b: Builder) -> Value:
    attrs: dict[str, Attr] = {"size": shape, "fill_value": fill, "dtype": DType(value.dtype)}
    types = [TensorType(value.dtype, shape)]
    return b.emit("aten.full.default", [], types, like=op, attrs=attrs)[0]


def weighted_sum(values: Value, weights: Value, op: Op, b: Builder) -> Value:
    """The sum over the last axis of values * weights."""
    (product,) = b.emit("aten.mul.Tensor", [values, weights], [values.type], like=op)
    attrs: dict[str, Attr] = {"dim": (len(values.shape) - 1,)}
    total = TensorType(values.dtype, values.shape[:-1])
    return b.emit("aten.sum.dim_IntList", [product], [total], like=op, attrs=attrs)[0]
