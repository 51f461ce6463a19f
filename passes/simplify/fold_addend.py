"""An addend of a combine's result, such as a shared expert or a residual, is added by the combine.

    y = moe.combine(rows, slots, weights)
    z = aten.add(y, shared)                 ->   z = moe.combine(rows, slots, weights, shared)

This saves one read and write of [T, D]. The sum stays in float32 until it is complete, where eager
rounds the routed part first. The result of moe.zero_experts is an addend too; the addend after it
is folded into moe.zero_experts, so that zero experts that no token chose change no rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.ir.graph import Attr, DType, Op, Program, Stage, Value
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass


@dataclass(frozen=True)
class FoldAddend(Pass):
    """Add a shared expert's result, or the residual, inside the combine."""

    name: ClassVar[str] = "fold-addend"
    gives: ClassVar[Stage] = Stage.MOE

    def run(self, program: Program, log: Log) -> Program:
        graph = rewrite(program.graph, fold_addend, log)
        return Program(rewrite(graph, fold_next, log), program.weights)


def fold_addend(op: Op, b: Builder) -> Sequence[Value] | None:
    """The first addend of a combine."""
    return _fold(op, b, lambda combine: None if combine.attrs.get("added") else combine)


def fold_next(op: Op, b: Builder) -> Sequence[Value] | None:
    """The second addend, where the first is the result of moe.zero_experts, which then adds it."""

    def free(combine: Op) -> Op | None:
        addend = b.producers.get(combine.inputs[-1]) if combine.attrs.get("added") else None
        single = addend is not None and len(b.graph.readers.get(addend.outputs[0], ())) == 1
        zero = single and addend is not None and addend.name == "moe.zero_experts"
        wide = combine.outputs[0].dtype == "f64"  # which zero experts, in float32, would round
        free_to_add = zero and not wide and addend is not None and not addend.attrs.get("added")
        return addend if free_to_add else None

    return _fold(op, b, free)


def _fold(op: Op, b: Builder, adder: Callable[[Op], Op | None]) -> Sequence[Value] | None:
    """Folds an addend of a combine into the op that `adder` returns for the combine: the combine
    itself, or the producer of its first addend. None: nothing is folded."""
    if op.name != "aten.add.Tensor" or len(op.inputs) != 2 or op.attrs.get("alpha", 1) != 1:
        return None
    for routed, other in (op.inputs, op.inputs[::-1]):
        combine = _match_combine(routed, b)
        adds = None if combine is None else adder(combine)
        if (
            combine is not None
            and adds is not None
            and other.type == routed.type == op.outputs[0].type
        ):
            break
    else:
        return None
    (y,) = combine.outputs
    flat = b.reshape(other, y.shape, like=op)
    if adds is not combine:
        more: dict[str, Attr] = {"added": True, "dtype": DType("f32")}
        inputs = [*adds.inputs, flat]
        (flat,) = b.emit(adds.name, inputs, like=adds, attrs={**adds.attrs, **more})
    rest = combine.inputs if adds is combine else combine.inputs[:-1]
    inputs = [*rest, flat]
    (total,) = b.emit("moe.combine", inputs, like=op, attrs={**combine.attrs, "added": True})
    return [b.reshape(total, op.outputs[0].shape, like=op)]


def _match_combine(value: Value, b: Builder) -> Op | None:
    """The combine that produces `value`, perhaps through a reshape, if its result has no other
    reader."""
    source = b.producers.get(value)
    if source is not None and source.name == "aten.reshape.default":
        if len(b.graph.readers.get(value, ())) > 1:
            return None
        value = source.inputs[0]
        source = b.producers.get(value)
    if source is None or source.name != "moe.combine":
        return None
    return source if len(b.graph.readers.get(value, ())) <= 1 else None
