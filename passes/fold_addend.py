"""What is added to the result of a combine is added by the combine: a shared expert, a residual.

    y = moe.combine(rows, slots, weights)
    z = aten.add(y, shared)                 ->   z = moe.combine(rows, slots, weights, shared)

One pass over [T, D] less. The sum stays in float32 until it is complete, where eager rounds
the routed part first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.ir import Op, Program, Stage, TensorType, Value
from moec.passes.rewrite import Builder, rewrite
from moec.passes.runner import Log


@dataclass(frozen=True)
class FoldAddend:
    """Add a shared expert's result, or the residual, inside the combine."""

    name: ClassVar[str] = "fold-addend"
    takes: ClassVar[Stage] = Stage.GROUPED
    gives: ClassVar[Stage] = Stage.MOE

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, fold_addend, log), program.weights)


def fold_addend(op: Op, b: Builder) -> Sequence[Value] | None:
    if op.name != "aten.add.Tensor" or len(op.inputs) != 2 or op.attrs.get("alpha", 1) != 1:
        return None
    for routed, other in (op.inputs, op.inputs[::-1]):
        combine = _combine_behind(routed, b)
        if combine is not None and other.type == routed.type == op.outputs[0].type:
            break
    else:
        return None
    (y,) = combine.outputs
    flat = other
    if flat.shape != y.shape:
        attrs = {"shape": y.shape}
        types = [TensorType(other.dtype, y.shape)]
        (flat,) = b.emit("aten.reshape.default", [other], types, like=op, attrs=attrs)
    inputs = [*combine.inputs, flat]
    (total,) = b.emit("moe.combine", inputs, like=op, attrs={**combine.attrs, "added": True})
    if total.shape == op.outputs[0].shape:
        return (total,)
    attrs = {"shape": op.outputs[0].shape}
    return b.emit("aten.reshape.default", [total], [op.outputs[0].type], like=op, attrs=attrs)


def _combine_behind(value: Value, b: Builder) -> Op | None:
    """The combine that made `value`, through a reshape, where nobody else reads its result."""
    source = b.producers.get(value)
    if source is not None and source.name == "aten.reshape.default":
        if len(b.graph.readers.get(value, ())) > 1:
            return None
        value = source.inputs[0]
        source = b.producers.get(value)
    if source is None or source.name != "moe.combine" or source.attrs.get("added"):
        return None
    return source if len(b.graph.readers.get(value, ())) <= 1 else None
