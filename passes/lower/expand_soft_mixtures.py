"""Soft mixtures are two softmaxes, two products, and grouped products over the slots.

    y = moe.soft_mixture(x, dispatch, combine, w…) {…}
    ->
    slots = aten.bmm(permute(aten.softmax(dispatch, 1)), x)             [B, E*P, D]
    rows = reshape(permute(slots))                                      [E*B*P, D]
    ends = moe.even_ends() <each=B*P>
    outs = the body over all rows, as of moe.experts(rows, ends, w…)
    y = aten.bmm(aten.softmax(combine, 2), reshape(permute(outs)))

The slots of an expert are consecutive by construction, so nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.ir.graph import Attr, Op, Program, TensorType, Value
from moec.ir.opdef import integer
from moec.ir.ops.experts.soft_mixture import slots_of
from moec.ir.sizes.dims import Dim, product
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass
from moec.passes.lower.expand_experts import expand_experts


@dataclass(frozen=True)
class ExpandSoftMixtures(Pass):
    """Write out a soft mixture: softmaxes, products, and its experts over all slots at once."""

    name: ClassVar[str] = "expand-soft-mixtures"

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, expand, log), program.weights)


def expand(op: Op, b: Builder) -> Sequence[Value] | None:
    if op.name != "moe.soft_mixture" or op.body is None:
        return None
    x, dispatch, combine, *stacks = op.inputs
    batch, _, slots = dispatch.shape
    experts, each = integer(op, "num_experts"), slots_of(op)
    weights = b.cast(softmax(dispatch, 1, op, b), x.dtype, like=op)
    turned = b.permute(weights, (0, 2, 1), like=op)
    types = [TensorType(x.dtype, (batch, slots, x.shape[2]))]
    (sums,) = b.emit("aten.bmm.default", [turned, x], types, like=op, named=f"{x.name}_slots")
    rows = rows_by_expert(sums, (batch, experts, each), op, b)
    count = product((batch, each))
    attrs: dict[str, Attr] = {"num_experts": experts, "each": count}
    (ends,) = b.emit("moe.even_ends", [], like=op, attrs=attrs, named=f"{x.name}_ends")
    result = TensorType(op.outputs[0].dtype, (*rows.shape[:1], op.outputs[0].shape[2]))
    named = Value(f"{op.outputs[0].name}_outs", result)
    body = Op("moe.experts", (rows, ends, *stacks), (named,), {}, op.body, op.origin)
    (outs,) = expand_experts(body, b) or ()
    outs = b.reshape(outs, (experts, batch, each, result.shape[1]), like=op)
    outs = b.permute(outs, (1, 0, 2, 3), like=op)
    outs = b.reshape(outs, (batch, slots, result.shape[1]), like=op)
    shares = b.cast(softmax(combine, 2, op, b), outs.dtype, like=op)
    return b.emit("aten.bmm.default", [shares, outs], [op.outputs[0].type], like=op)


def softmax(logits: Value, dim: int, op: Op, b: Builder) -> Value:
    attrs: dict[str, Attr] = {"dim": dim}
    return b.emit("aten.softmax.int", [logits], [logits.type], like=op, attrs=attrs)[0]


def rows_by_expert(sums: Value, parts: tuple[Dim, Dim, Dim], op: Op, b: Builder) -> Value:
    """Slots [B, E*P, D] as rows [E*B*P, D], grouped by expert."""
    batch, experts, each = parts
    width = sums.shape[2]
    value = b.reshape(sums, (batch, experts, each, width), like=op)
    value = b.permute(value, (1, 0, 2, 3), like=op)
    return b.reshape(value, (product(parts), width), like=op)
