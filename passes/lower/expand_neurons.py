"""Experts of one neuron become two sums over gathered rows of the two tables of weights.

    y = moe.neurons(x, experts, weights, inward, outward) {f}
    ->
    sums = aten.sum(inward[experts] * x[:, None], 2)                        [T, k]
    y = aten.sum((f(sums) * weights)[:, :, None] * outward[experts], 1)     [T, D']

Each sum is fused with its gather and its product, so that no [T, k, D] is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.ir.graph import Attr, Op, Program, TensorType, Value
from moec.ir.sizes.dims import Dim
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass


@dataclass(frozen=True)
class ExpandNeurons(Pass):
    """Write out experts of one neuron: two sums over gathered rows, which are never stored."""

    name: ClassVar[str] = "expand-neurons"

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, expand, log), program.weights)


def expand(op: Op, b: Builder) -> Sequence[Value] | None:
    if op.name != "moe.neurons" or op.body is None:
        return None
    x, experts, weights, inward, outward = op.inputs
    tokens, k = experts.shape
    rows = b.reshape(x, (tokens, 1, x.shape[1]), like=op)
    sums = weighted_sum(rows, inward, experts, 2, op, b)
    new = {op.body.inputs[0]: sums}
    for inner in op.body.ops:
        (output,) = inner.outputs
        types = [TensorType(output.dtype, sums.shape)]
        inputs = [new[value] for value in inner.inputs]
        (new[output],) = b.emit(inner.name, inputs, types, like=op, attrs=inner.attrs)
    active = new[op.body.outputs[0]]
    (active,) = b.emit("aten.mul.Tensor", [active, weights], [weights.type], like=op)
    columns = b.reshape(active, (tokens, k, 1), like=op)
    return (weighted_sum(columns, outward, experts, 1, op, b),)


def weighted_sum(
    scale: Value, table: Value, experts: Value, axis: int, op: Op, b: Builder
) -> Value:
    """The sum over an axis of table[experts] * scale."""
    full: tuple[Dim, ...] = (*experts.shape, table.shape[1])
    type = TensorType(table.dtype, full)
    (rows,) = b.emit("aten.embedding.default", [table, experts], [type], like=op)
    (parts,) = b.emit("aten.mul.Tensor", [rows, scale], [type], like=op)
    attrs: dict[str, Attr] = {"dim": (axis,)}
    result = TensorType(table.dtype, tuple(d for i, d in enumerate(full) if i != axis))
    return b.emit("aten.sum.dim_IntList", [parts], [result], like=op, attrs=attrs)[0]
