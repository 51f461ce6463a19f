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
    return VectorBody(body, body_text(body))


def body_text(body: Graph) -> str:
    """The body with values numbered, so that layers with other names share a kernel."""
    numbers: dict[Value, int] = {}
    for value in body.values():
        numbers[value] = len(numbers)
    lines = [str([v.dtype for v in body.inputs])]
    for op in body.ops:
        inputs, attrs = [numbers[v] for v in op.inputs], sorted(map(str, op.attrs.items()))
        lines.append(f"{op.name} {inputs} {attrs} {op.outputs[0].dtype}")
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


def _scaled(c: _VectorCall, name: str) -> Expr:
    """An operand times alpha."""
    return c.get(name) if c["alpha"] == 1 else c.get(name) * c.v.splat(float(c["alpha"]))


def _gelu(c: _VectorCall) -> Expr:
    x = c.get("self")
    return c.v.gelu_tanh(x) if c["approximate"] == "tanh" else c.v.gelu(x)


def _pow(c: _VectorCall) -> Expr:
    x = c.v.bind(c.get("self"))
    if c["exponent"] == 2:
        return x * x
    if c["exponent"] == 3:
        return x * x * x
    return T.pow(x, c.v.splat(float(c["exponent"])))


def _clamp(c: _VectorCall) -> Expr:
    x = c.get("self")
    for name, by in (("min", c.v.at_least), ("max", c.v.at_most)):
        limit = named(c.op).get(name, named(c.op).get(f"{name}_val"))
        if limit is not None and (math.isfinite(limit) or "clamp_" in c.op.name):
            x = by(x, float(limit))
    return x


_RULES: dict[str, Callable[[_VectorCall], Expr]] = {
    "add.Tensor add.Scalar": lambda c: c.get("self") + _scaled(c, "other"),
    "sub.Tensor sub.Scalar": lambda c: c.get("self") - _scaled(c, "other"),
    "rsub.Scalar rsub.Tensor": lambda c: c.get("other") - _scaled(c, "self"),
    "mul.Tensor mul.Scalar": lambda c: c.get("self") * c.get("other"),
    "div.Tensor div.Scalar": lambda c: c.get("self") / c.get("other"),
    "neg": lambda c: c.v.splat(0.0) - c.get("self"),
    "_to_copy clone alias detach contiguous": lambda c: c.get("self"),
    "silu": lambda c: c.v.silu(c.get("self")),
    "sigmoid": lambda c: c.v.sigmoid(c.get("self")),
    "tanh": lambda c: c.v.tanh(c.get("self")),
    "exp": lambda c: c.v.exp(c.get("self")),
    "relu": lambda c: c.v.relu(c.get("self")),
    "erf": lambda c: c.v.erf(c.get("self")),
    "gelu": _gelu,
    "pow.Tensor_Scalar": _pow,
    "clamp hardtanh clamp_min clamp_max": _clamp,
}
VECTOR_OPS = {
    f"aten.{name}" if "." in name else f"aten.{name}.default": emit
    for names, emit in _RULES.items()
    for name in names.split()
}
