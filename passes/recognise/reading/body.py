"""One expert's body in its canonical form: linear layers with [N, K] weights.

An op of the body that reads only a param (transpose, slice, cast) is the same for every expert. It
is moved out of the body and applied once to the whole stack: `w.t()` of a [K, N] slice becomes a
permute of the [E, K, N] stack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moec.errors import NoMatch
from moec.ir.graph import Attr, Graph, Op, TensorType, Value
from moec.ir.sizes.dims import Dim, symbol

ROWS = symbol("R")

Shift = Callable[[Mapping[str, Attr]], dict[str, Attr]]
"""Converts the attributes of an op on one expert's param to those of the same op on the stack,
which has one more axis in front."""


def _shifted(*names: str) -> Shift:
    """Adds 1 to the axes in the attributes `names`; negative axes count from the end and stay."""

    def shift(attrs: Mapping[str, Attr]) -> dict[str, Attr]:
        def up(axis: Attr) -> Attr:
            if isinstance(axis, tuple):
                return tuple(map(up, axis))
            return axis + 1 if isinstance(axis, int) and axis >= 0 else axis

        shifted = {name: up(value) for name, value in attrs.items() if name in names}
        if "dim" in names and "dim" not in attrs:
            shifted["dim"] = 1
        return {**attrs, **shifted}

    return shift


def _permuted(attrs: Mapping[str, Attr]) -> dict[str, Attr]:
    dims = attrs["dims"]
    assert isinstance(dims, tuple)
    rank = len(dims)
    return {"dims": (0, *(int(d) % rank + 1 for d in dims))}


_KEEP: Shift = dict
_HOISTED: dict[str, Shift] = {
    "aten.permute.default": _permuted,
    "aten.unsqueeze.default": _shifted("dim"),
    "aten.squeeze.dims": _shifted("dim"),
    "aten.slice.Tensor": _shifted("dim"),
    "aten._to_copy.default": _KEEP,
    "aten.clone.default": _KEEP,
    "aten.alias.default": _KEEP,
    "aten.t.default": lambda attrs: {"dims": (0, 2, 1)},
    "aten.transpose.int": _shifted("dim0", "dim1"),
}
_RESHAPE, _UNSQUEEZE = "aten.reshape.default", "aten.unsqueeze.default"
_RENAMED = {"aten.t.default": "aten.permute.default"}


@dataclass(frozen=True)
class Prepared:
    """A param of the canonical body: a stack and the ops applied to all of it.

    `source` is the index of the stack in `Proposal.stacks`; a step is (op, attributes, shape,
    dtype).
    """

    source: int
    steps: tuple[tuple[str, Mapping[str, Attr], tuple[Dim, ...], str], ...] = ()


def canonical(body: Graph, experts: int) -> tuple[Graph, tuple[Prepared, ...]]:
    """`body` without the ops on params alone, and with products written as linear layers.

    The second result has, for each param of the new body, the ops that prepare its stack. Raises
    NoMatch for an addmm that is no linear layer.
    """
    state = _Canonical(body, experts)
    for op in body.ops:
        state.op(op)
    params = tuple(state.prepared)
    outputs = tuple(state.new.get(v, v) for v in body.outputs)
    graph = Graph(body.inputs, params, tuple(state.ops), outputs, (), body.bounds, "body")
    needed = {v for op in state.ops for v in op.inputs} | set(outputs)
    used = sorted((p for p in params if p in needed), key=lambda p: state.prepared[p].source)
    return replace(graph, params=tuple(used)), tuple(state.prepared[p] for p in used)


def with_columns(body: Graph) -> Graph:
    """`body` with a result of shape [R] changed to [R, 1].

    The reshape that drops the feature axis is removed, and the ops after it work on [R, 1]. Raises
    NoMatch if the result was never [R, 1], or if an op in between combines it with another shape.
    """
    (result,) = body.outputs
    if len(result.shape) != 1:
        return body
    columns: dict[Value, Value] = {}
    ops: list[Op] = []
    for op in body.ops:
        (output,) = op.outputs
        if op.name == _RESHAPE and op.inputs[0].shape == (*output.shape, 1):
            columns[output] = columns.get(op.inputs[0], op.inputs[0])
            continue
        inputs = tuple(columns.get(value, value) for value in op.inputs)
        if inputs != op.inputs:
            if output.shape != result.shape:
                raise NoMatch(f"{op.name} splits a value with one number per row")
            columns[output] = replace(output, type=TensorType(output.dtype, (*output.shape, 1)))
            for value in {v for v in inputs if v in body.params and not v.shape}:
                columns[value] = Value(f"{value.name}_column", TensorType(value.dtype, (1,)))
                ops.append(Op(_UNSQUEEZE, (value,), (columns[value],), {"dim": 0}))
            inputs = tuple(columns.get(value, value) for value in inputs)
        ops.append(replace(op, inputs=inputs, outputs=(columns.get(output, output),)))
    if result not in columns:
        raise NoMatch(f"{result.name} has one number per row, but no axis of features")
    return replace(body, ops=tuple(ops), outputs=(columns[result],))


class _Canonical:
    def __init__(self, body: Graph, experts: int) -> None:
        self.experts = experts
        self.new: dict[Value, Value] = {}
        self.prepared: dict[Value, Prepared] = {p: Prepared(i) for i, p in enumerate(body.params)}
        self.ops: list[Op] = []
        self.reads = Counter(v for op in body.ops for v in op.inputs)

    def op(self, old: Op) -> None:
        inputs = tuple(self.new.get(v, v) for v in old.inputs)
        op = replace(old, inputs=inputs)
        if len(inputs) == 1 and inputs[0] in self.prepared:
            self.hoist(op)
        elif op.name in ("aten.mm.default", "aten.matmul.default") and self.is_weight(inputs[1]):
            self.linear(op, inputs[0], inputs[1], None)
        elif op.name == "aten.addmm.default" and self.is_weight(inputs[2]):
            if set(op.attrs) & {"alpha", "beta"} or len(inputs[0].shape) != 1:
                raise NoMatch("addmm with factors is not a linear layer")
            self.linear(op, inputs[1], inputs[2], inputs[0])
        elif not self.bias(op):
            self.ops.append(op)

    def bias(self, op: Op) -> bool:
        """Rewrites linear(x, w) + b to linear(x, w, b) if the add is the only reader of the
        product."""
        if op.name != "aten.add.Tensor" or len(op.inputs) != 2 or op.attrs or not self.ops:
            return False
        last = self.ops[-1]
        for product, bias in (op.inputs, op.inputs[::-1]):
            if (
                last.name == "aten.linear.default"
                and last.outputs == (product,)
                and len(last.inputs) == 2
                and bias in self.prepared
                and bias.shape == product.shape[-1:]
                and op.outputs[0].type == product.type
                and self.reads[product] == 1
            ):
                self.ops[-1] = Op(last.name, (*last.inputs, bias), op.outputs)
                return True
        return False

    def is_weight(self, value: Value) -> bool:
        return value in self.prepared and len(value.shape) == 2

    def linear(self, op: Op, x: Value, weight: Value, bias: Value | None) -> None:
        turned = self.emit(
            weight, "aten.permute.default", {"dims": (0, 2, 1)}, (weight.shape[1], weight.shape[0])
        )
        inputs = (x, turned) if bias is None else (x, turned, bias)
        self.ops.append(Op("aten.linear.default", inputs, op.outputs))

    def hoist(self, op: Op) -> None:
        shift = _HOISTED.get(op.name)
        if shift is None:
            self.ops.append(op)
            return
        name, attrs = _RENAMED.get(op.name, op.name), shift(op.attrs)
        output = op.outputs[0]
        self.new[output] = self.emit(op.inputs[0], name, attrs, output.shape, output.dtype)

    def emit(
        self,
        value: Value,
        name: str,
        attrs: Mapping[str, Attr],
        shape: Sequence[Dim],
        dtype: str | None = None,
    ) -> Value:
        before = self.prepared[value]
        if name in ("aten.clone.default", "aten.alias.default"):
            return value
        dtype = dtype or value.dtype
        steps = (*before.steps, (name, dict(attrs), (self.experts, *shape), dtype))
        steps = _without_double_turns(steps)
        for param, prepared in self.prepared.items():
            if prepared.source == before.source and prepared.steps == steps:
                return param
        turned = Value(_fresh(value.name, self.prepared), TensorType(dtype, tuple(shape)))
        self.prepared[turned] = Prepared(before.source, steps)
        return turned


def _without_double_turns(
    steps: tuple[tuple[str, Mapping[str, Attr], tuple[Dim, ...], str], ...],
) -> tuple[tuple[str, Mapping[str, Attr], tuple[Dim, ...], str], ...]:
    """The steps without two transposes in a row at the end, which cancel out."""
    turn = "aten.permute.default", {"dims": (0, 2, 1)}
    if len(steps) > 1 and all((s[0], dict(s[1])) == turn for s in steps[-2:]):
        return steps[:-2]
    return steps


def _fresh(name: str, values: Mapping[Value, Prepared]) -> str:
    names = {v.name for v in values}
    count = 2
    while f"{name}_{count}" in names:
        count += 1
    return f"{name}_{count}"
