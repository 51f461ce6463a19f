"""The router's linear layer and its top-k become one kernel.

    logits = aten.linear(x, w)
    weights, experts = moe.route(logits)    ->    weights, experts = moe.gate(x, w)

The logits, [T, E], are never stored. The dtypes in which eager computes and rounds them are
attributes of moe.gate, because the choice of experts depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.errors import NoMatch
from moec.ir.graph import Attr, DType, Op, Program, Stage, Value
from moec.ir.ops.routing.routing import Routing
from moec.ir.sizes.dims import product
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass

_REPHRASING = ("aten.reshape.default", "aten._to_copy.default")
_WIDENINGS = {("bf16", "f32"), ("f16", "f32")}


@dataclass(frozen=True)
class FuseGate(Pass):
    """Compute the router's logits and its top-k in one kernel."""

    name: ClassVar[str] = "fuse-gate"
    takes: ClassVar[Stage] = Stage.MOE
    gives: ClassVar[Stage] = Stage.MOE

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, fuse_gate, log), program.weights)


def fuse_gate(op: Op, b: Builder) -> Sequence[Value] | None:
    if op.name != "moe.route":
        return None
    logits, *correction = op.inputs
    linear, rounded = _match_linear(logits, b)
    x, weight, *bias = linear.inputs
    if bias and len(bias[0].shape) != 1:
        raise NoMatch(f"the router's bias is {bias[0].type}, not one number an expert")
    if weight not in b.params:
        raise NoMatch(f"the router's weight {weight.name} is computed, not stored")
    compute = x.dtype
    if compute == "f64":
        raise NoMatch("the logits are f64, and the kernel of a gate adds in float32")
    x = _before_upcast(x, b)
    x = _flat(x, op, b)
    attrs: dict[str, Attr] = {
        **Routing.of(op).attrs(),
        "compute": DType(compute),
        "logits": DType(rounded),
    }
    if bias:
        attrs["biased"] = True
    if correction:
        attrs["corrected"] = True
    inputs = [x, weight, *bias, *correction]
    return b.emit("moe.gate", inputs, like=op, attrs=attrs, named=("weights", "experts"))


def _match_linear(logits: Value, b: Builder) -> tuple[Op, str]:
    """The linear that computes the logits, and the narrowest dtype they are rounded to after it."""
    rounded = logits.dtype
    current = logits
    while (source := b.producers.get(current)) is not None and source.name in _REPHRASING:
        if len(b.graph.readers.get(current, ())) > 1:
            raise NoMatch(f"the logits {current.name} have other readers")
        current = source.inputs[0]
        if source.name == "aten._to_copy.default":
            if (current.dtype, source.outputs[0].dtype) not in _WIDENINGS:
                raise NoMatch(f"the logits are cast from {current.dtype} to {logits.dtype}")
            rounded = current.dtype
    if source is None or source.name != "aten.linear.default":
        producer = source.name if source is not None else "an input"
        raise NoMatch(f"the logits come from {producer}, not from a linear layer")
    if len(b.graph.readers.get(current, ())) > 1:
        raise NoMatch(f"the logits {current.name} have other readers")
    return source, rounded


def _before_upcast(x: Value, b: Builder) -> Value:
    """The operand of a lossless upcast to x, which the kernel does as it reads; x without one."""
    source = b.producers.get(x)
    if source is not None and source.name == "aten._to_copy.default":
        if (source.inputs[0].dtype, x.dtype) in _WIDENINGS:
            return source.inputs[0]
    return x


def _flat(x: Value, op: Op, b: Builder) -> Value:
    """x as [T, D]: the operand of a reshape that only splits T, else x reshaped."""
    source = b.producers.get(x)
    if len(x.shape) == 2:
        return x
    if source is not None and source.name == "aten.reshape.default":
        flat = source.inputs[0]
        if len(flat.shape) == 2 and flat.shape[-1] == x.shape[-1]:
            return flat
    shape = (product(x.shape[:-1]), x.shape[-1])
    return b.reshape(x, shape, like=op)
