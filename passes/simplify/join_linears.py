"""Linear layers that read the same value become one layer with concatenated weights.

    m0 = aten.linear(z, w0, b0)                y = aten.linear(z, w, b)       w = cat(w0, s0, …)
    s0 = aten.linear(z, u0, c0)        ->      m0 = aten.slice(y) <0, N>
    m1 = aten.linear(z, w1, b1) …              s0 = aten.slice(y) <N, 2*N>
                                               …

Heads of several experts over one encoding (MoE-LM, arXiv 2206.00059) are small products of few
rows, and their cost is mostly that of the calls. Exact: each number is the same sum. For large
layers, slicing the result may cost more than one product saves; hence the pass is opt-in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from moec.ir.graph import Attr, Graph, Op, Program, Stage, TensorType, Value
from moec.passes.core.moe_layer import Splice
from moec.passes.core.runner import Log, Pass

LINEAR = "aten.linear.default"


@dataclass(frozen=True)
class JoinLinears(Pass):
    """Evaluate linear layers that read one value as one."""

    name: ClassVar[str] = "join-linears"
    takes: ClassVar[Stage] = Stage.MOE
    gives: ClassVar[Stage] = Stage.MOE
    source: ClassVar[str] = "heads of experts over one encoding: MoE-LM, arXiv 2206.00059"

    def run(self, program: Program, log: Log) -> Program:
        splice = Splice(program)
        for layers in joinable_groups(program.graph):
            if log.spend(f"{len(layers)} layers that read {layers[0].inputs[0].name}"):
                join(splice, layers, program)
                log.says.append(f"{len(layers)} linear layers that read one value become one")
        return splice.done()


def joinable_groups(graph: Graph) -> Iterator[list[Op]]:
    """Groups of two or more linear layers that read the same value and differ in their width alone:
    all with a bias or all without, with stored weights."""
    groups: dict[tuple[object, ...], list[Op]] = {}
    for op in graph.ops:
        if op.name == LINEAR and all(value in graph.params for value in op.inputs[1:]):
            y, weight = op.outputs[0], op.inputs[1]
            key = (op.inputs[0], len(op.inputs), y.dtype, weight.dtype, *op.attrs)
            groups.setdefault(key, []).append(op)
    yield from (layers for layers in groups.values() if len(layers) > 1)


def join(splice: Splice, layers: Sequence[Op], program: Program) -> None:
    """Puts the joined layer and the slices of its result in place of the first of `layers`."""
    first = layers[0]
    stored = []
    for which in range(1, len(first.inputs)):
        tensor = torch.cat([program.weights[op.inputs[which].name] for op in layers])
        stored.append(splice.weight(f"{first.inputs[which].name}.joined", tensor))
    y = first.outputs[0]
    ops: list[Op] = []
    result = TensorType(y.dtype, (*y.shape[:-1], stored[0].shape[0]))
    joined = splice.emit(ops, LINEAR, [first.inputs[0], *stored], result, first)
    start = 0
    for op in layers:
        end = start + cast(int, op.outputs[0].shape[-1])
        ops.append(part(joined, op, start, end))
        start = end
    splice.put(first, ops)
    for op in layers[1:]:
        splice.put(op, ())


def part(joined: Value, layer: Op, start: int, end: int) -> Op:
    """The op that slices the output of `layer` from the joined result."""
    attrs: dict[str, Attr] = {"dim": len(joined.shape) - 1, "start": start, "end": end}
    return Op("aten.slice.Tensor", (joined,), layer.outputs, attrs, None, layer.origin)
