"""The body of a grouped linear as the epilogue of its kernel: ATen ops -> vectors of float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from moec.codegen.cpu.vector import Vector
from moec.dtypes import VECTOR_DTYPES
from moec.ir.aten import named
from moec.ir.graph import Graph, Op, Value
from moec.target.cpu import CpuTarget


@dataclass(frozen=True)
class VectorBody:
    """`text` is equal for equal bodies; `epilogue` takes one vector for each input of the body."""

    graph: Graph
    text: str

    @property
    def name(self) -> str:
        return "_".join(dict.fromkeys(op.name.split(".")[1] for op in self.graph.ops)) or "copy"

    def epilogue(self, target: CpuTarget) -> Callable[..., Expr]:
        v = Vector(target)

        def run(*sums: Expr) -> Expr:
            values: dict[Value, Expr] = dict(zip(self.graph.inputs, sums, strict=True))
            for op in self.graph.ops:
                result = VECTOR_OPS[op.name](_VectorCall(v, op, values))
                values[op.outputs[0]] = v.bind(result)
            return values[self.graph.outputs[0]]

        return run


def vector_body(body: Graph) -> VectorBody | None:
    """The body for a kernel; None if vectors of float32 cannot express it."""
    shapes = {v.shape for v in body.inputs}
    for op in body.ops:
        if op.name not in VECTOR_OPS or len(op.outputs) != 1:
            return None
        if op.outputs[0].shape not in shapes or op.outputs[0].dtype not in VECTOR_DTYPES:
            return None
        for argument in named(op).values():
            if isinstance(argument, Value) and argument.shape not in (*shapes, ()):
                return None
    if body.params or len(body.outputs) != 1:
        return None
    return VectorBody(body, _canonical(body))


def _canonical(body: Graph) -> str:
    """The body's text with values numbered, so that layers with other names share a kernel."""
    numbers: dict[Value, int] = {}
    for value in body.values():
        numbers[value] = len(numbers)
    lines = [str([v.dtype for v in body.inputs])]
    for op in body.ops:
        inputs = [numbers[v] for v in op.inputs]
        lines.append(
            f"{op.name} {inputs} {sorted(map(str, op.attrs.items()))} {op.outputs[0].dtype}"
        )
    return "\n".join([*lines, str([numbers[v] for v in body.outputs])])


@dataclass(frozen=True)
class _VectorCall:
    v: Vector
    op: Op
    values: dict[Value, Expr]

    def __getitem__(self, name: str) -> Any:
        return named(self.op)[name]

    def get(self, name: str) -> Expr:
        """An operand, a vector or a number, as a vector."""
        argument = self[name]
        if isinstance(argument, Value):
            return self.values[argument]
        return self.v.splat(float(argument))


VECTOR_OPS: dict[str, Callable[[_VectorCall], Expr]] = {}


def _vector(
    *names: str,
) -> Callable[[Callable[[_VectorCall], Expr]], Callable[[_VectorCall], Expr]]:
    def register(emit: Callable[[_VectorCall], Expr]) -> Callable[[_VectorCall], Expr]:
        for name in names:
            VECTOR_OPS[f"aten.{name}" if "." in name else f"aten.{name}.default"] = emit
        return emit

    return register


@_vector("add.Tensor", "add.Scalar")
def _add(c: _VectorCall) -> Expr:
    other = c.get("other")
    return c.get("self") + (other if c["alpha"] == 1 else other * c.v.splat(float(c["alpha"])))


@_vector("sub.Tensor", "sub.Scalar")
def _sub(c: _VectorCall) -> Expr:
    other = c.get("other")
    return c.get("self") - (other if c["alpha"] == 1 else other * c.v.splat(float(c["alpha"])))


@_vector("rsub.Scalar", "rsub.Tensor")
def _rsub(c: _VectorCall) -> Expr:
    subtrahend = c.get("self")
    return c.get("other") - (
        subtrahend if c["alpha"] == 1 else subtrahend * c.v.splat(float(c["alpha"]))
    )


@_vector("mul.Tensor", "mul.Scalar")
def _mul(c: _VectorCall) -> Expr:
    return c.get("self") * c.get("other")


@_vector("div.Tensor", "div.Scalar")
def _div(c: _VectorCall) -> Expr:
    return c.get("self") / c.get("other")


@_vector("neg")
def _neg(c: _VectorCall) -> Expr:
    return c.v.splat(0.0) - c.get("self")


@_vector("_to_copy", "clone", "alias", "detach", "contiguous")
def _identity(c: _VectorCall) -> Expr:
    return c.get("self")


@_vector("silu")
def _silu(c: _VectorCall) -> Expr:
    return c.v.silu(c.get("self"))


@_vector("sigmoid")
def _sigmoid(c: _VectorCall) -> Expr:
    return c.v.sigmoid(c.get("self"))


@_vector("tanh")
def _tanh(c: _VectorCall) -> Expr:
    return c.v.tanh(c.get("self"))


@_vector("exp")
def _exp(c: _VectorCall) -> Expr:
    return c.v.exp(c.get("self"))


@_vector("relu")
def _relu(c: _VectorCall) -> Expr:
    return c.v.relu(c.get("self"))


@_vector("gelu")
def _gelu(c: _VectorCall) -> Expr:
    x = c.get("self")
    return c.v.gelu_tanh(x) if c["approximate"] == "tanh" else c.v.gelu(x)


@_vector("erf")
def _erf(c: _VectorCall) -> Expr:
    return c.v.erf(c.get("self"))


@_vector("pow.Tensor_Scalar")
def _pow(c: _VectorCall) -> Expr:
    x = c.v.bind(c.get("self"))
    if c["exponent"] == 2:
        return x * x
    if c["exponent"] == 3:
        return x * x * x
    return T.pow(x, c.v.splat(float(c["exponent"])))


@_vector("clamp", "hardtanh")
def _clamp(c: _VectorCall) -> Expr:
    names = ("min_val", "max_val") if "hardtanh" in c.op.name else ("min", "max")
    x = c.get("self")
    for name, by in zip(names, (c.v.at_least, c.v.at_most), strict=True):
        if c[name] is not None and math.isfinite(c[name]):
            x = by(x, float(c[name]))
    return x


@_vector("clamp_min")
def _clamp_min(c: _VectorCall) -> Expr:
    return c.v.at_least(c.get("self"), float(c["min"]))


@_vector("clamp_max")
def _clamp_max(c: _VectorCall) -> Expr:
    return c.v.at_most(c.get("self"), float(c["max"]))
