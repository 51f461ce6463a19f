"""The activation between two grouped linears joins the first: SwiGLU, GeGLU, with their biases.

    g = grouped.linear(rows, ends, gate)
    u = grouped.linear(rows, ends, up)
    a = silu(g)
    h = mul(a, u)                      ->   h = grouped.linear(rows, ends, gate, up) {
    y = grouped.linear(h, ends, down)         body(acc_0, acc_1): mul(silu(acc_0), acc_1) }
                                            y = grouped.linear(h, ends, down)

g, u and a are [R, H] each; unfused, they are written or read five times. Any expression of
element-wise ops fuses: the kernel evaluates the expression that the body holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from moec.errors import NoMatch
from moec.ir.graph import Attr, DType, Graph, Op, Program, TensorType, Value
from moec.ir.ops.experts.grouped import GroupedLinear
from moec.ir.sizes.dims import symbol
from moec.ir.traits import is_pointwise
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass


@dataclass(frozen=True)
class FuseActivation(Pass):
    """Evaluate the activation between two grouped linears (SwiGLU, GeGLU …) inside the first."""

    name: ClassVar[str] = "fuse-activation"

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, fuse_activation, log), program.weights)


def fuse_activation(op: Op, b: Builder) -> Sequence[Value] | None:
    if op.name != "grouped.linear" or op.attrs.get("gather"):
        return None
    down = GroupedLinear.of(op)
    top = b.producers.get(down.x)
    if top is None or not is_pointwise(top):
        return None
    between, linears = _expression(down.x, b)
    first = GroupedLinear.of(linears[0])
    for linear in linears:
        parts = GroupedLinear.of(linear)
        if linear.body is not None or len(parts.matrices) != 1:
            raise NoMatch(f"{linear.outputs[0].name} is fused already")
        if parts.x is not first.x or parts.ends is not first.ends:
            raise NoMatch(f"the activation mixes rows of {first.x.name} and {parts.x.name}")
        if bool(parts.biases) != bool(first.biases):
            raise NoMatch("one projection has a bias and another has none")
        if parts.matrices[0].shape != first.matrices[0].shape:
            raise NoMatch("the projections differ in width")
    fused = _fuse(between, linears, first, op, b)
    inputs = [fused if v is down.x else v for v in op.inputs]
    return b.emit(op.name, inputs, like=op, attrs=op.attrs, body=op.body)


def _expression(value: Value, b: Builder) -> tuple[list[Op], list[Op]]:
    """The element-wise ops that compute `value`, in order, and the grouped linears they read."""
    between: dict[Op, None] = {}
    linears: dict[Op, None] = {}

    def visit(current: Value) -> None:
        source = b.producers.get(current)
        if source is not None and source.name == "grouped.linear":
            linears[source] = None
        elif source is not None and is_pointwise(source) and current.shape == value.shape:
            for inner in source.inputs:
                visit(inner)
            between[source] = None
        else:
            raise NoMatch(
                f"the activation reads {current.name}, which is not the output of a grouped linear"
            )

    visit(value)
    if not linears:
        raise NoMatch("the activation reads no grouped linear")
    return list(between), list(linears)


def _fuse(
    between: Sequence[Op], linears: Sequence[Op], first: GroupedLinear, like: Op, b: Builder
) -> Value:
    rows, width = symbol("R"), linears[0].outputs[0].shape[1]
    parts = [GroupedLinear.of(linear) for linear in linears]
    new: dict[Value, Value] = {}
    for index, linear in enumerate(linears):
        (output,) = linear.outputs
        new[output] = Value(f"acc_{index}", TensorType(output.dtype, (rows, width)))
    arguments = tuple(new.values())
    ops: list[Op] = []
    for op in between:
        (output,) = op.outputs
        new[output] = Value(output.name, TensorType(output.dtype, (rows, width)))
        inputs = tuple(new[v] for v in op.inputs)
        ops.append(replace(op, inputs=inputs, outputs=(new[output],), origin=""))
    result = new[between[-1].outputs[0]]
    body = Graph(arguments, (), tuple(ops), (result,), name="body")
    attrs: dict[str, Attr] = {"matrices": len(linears), "dtype": DType(result.dtype)}
    if first.biases:
        attrs["biased"] = True
    matrices = [part.matrices[0] for part in parts]
    biases = [bias for part in parts for bias in part.biases]
    (fused,) = b.emit(
        "grouped.linear",
        [first.x, first.ends, *matrices, *biases],
        like=like,
        attrs=attrs,
        body=body,
        named=between[-1].outputs[0].name,
    )
    return fused
