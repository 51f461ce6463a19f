"""The last product of experts and the sum over choices become one op, for gradients.

    y = grouped.linear(h, ends, down)
    z = moe.combine(y, order, weights)     ->     z = grouped.combine(h, ends, down, order, weights)

Only the gradient of the routing weights reads y, and it can be computed from h: one product less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.ir.graph import Attr, DType, Op, Program, Value
from moec.ir.ops.experts.grouped import GroupedLinear
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass


@dataclass(frozen=True)
class FuseCombine(Pass):
    """Join the last grouped linear with the sum over each token's choices."""

    name: ClassVar[str] = "fuse-combine"

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, fuse_combine, log), program.weights)


def fuse_combine(op: Op, b: Builder) -> Sequence[Value] | None:
    if op.name != "moe.combine" or op.attrs.get("added"):
        return None
    rows, order, *weights = op.inputs
    last = b.producers.get(rows)
    if last is None or last.name != "grouped.linear" or len(order.shape) != 1:
        return None
    parts = GroupedLinear.of(last)
    plain = len(parts.matrices) == 1 and last.body is None and parts.order is None
    if not plain or last.attrs["dtype"] != DType(parts.x.dtype):
        return None
    attrs: dict[str, Attr] = {name: op.attrs[name] for name in ("k", "tokens", "dtype")}
    for name, holds in (("biased", parts.biases), ("weighted", weights)):
        if holds:
            attrs[name] = True
    inputs = [parts.x, parts.ends, *parts.matrices, *parts.biases, order, *weights]
    return b.emit("grouped.combine", inputs, like=op, attrs=attrs)
