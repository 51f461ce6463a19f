"""One program from two that differ only in sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch

from moec.capture.sizes.merged_size import Choice, Unmergeable
from moec.ir.graph import Attr, Graph, Op, Program, State, TensorType, Value
from moec.torch_private import schema_of

_SIZED = re.compile(r"\b(?:SymInt|Scalar|Tensor)(?:\[\d*\])?\?? (\w+)")
"""Arguments, in a schema of ATen, that may be expressions of sizes, some in place of a tensor."""


def merge_programs(first: Program, second: Program, choice: Choice) -> Program:
    """The program that is `first` and `second`, each where it holds; ops without a reader are left
    out. Raises Unmergeable where they differ in more than sizes."""
    a, b = _without_identities(first.graph), _without_identities(second.graph)
    values: dict[Value, Value] = {}
    for left, right in zip((*a.inputs, *a.params), (*b.inputs, *b.params), strict=False):
        if left.name != right.name or left.type != right.type:
            raise Unmergeable(f"{left} and {right}")
        values[right] = left
    if len(values) != len(a.inputs) + len(a.params) or len(values) != len(b.inputs) + len(b.params):
        raise Unmergeable("the weights")
    for value in a.params:
        if not _are_equal(first.weights[value.name], second.weights[value.name]):
            raise Unmergeable(f"the constant {value.name}")
    results = {value: value for value in values.values()}
    ours, theirs = _live(a), _live(b)
    if [op.name for op in ours] != [op.name for op in theirs]:
        raise Unmergeable("the operations")
    ops: list[Op] = []
    for op, twin in zip(ours, theirs, strict=True):
        if [values.get(value) for value in twin.inputs] != list(op.inputs) or op.body:
            raise Unmergeable(f"the operands of {op}")
        values |= dict(zip(twin.outputs, op.outputs, strict=True))
        pairs = zip(op.outputs, twin.outputs, strict=True)
        outputs = tuple(_value(x, y, choice) for x, y in pairs)
        results |= dict(zip(op.outputs, outputs, strict=True))
        attrs = _attrs(op, twin, choice)
        inputs = tuple(results[value] for value in op.inputs)
        ops.append(replace(op, inputs=inputs, outputs=outputs, attrs=attrs))
    if [values.get(value) for value in b.results] != list(a.results):
        raise Unmergeable("the results")
    states = tuple(State(state.before, results[state.after]) for state in a.states)
    outputs = tuple(results[value] for value in a.outputs)
    return Program(replace(a, ops=tuple(ops), outputs=outputs, states=states), first.weights)


def _are_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


_IDENTITIES = frozenset({"aten.slice.Tensor", "aten.expand.default", "aten.reshape.default"})
"""Ops that change nothing if they keep the shape; torch leaves some out where sizes are ints."""
_EFFECTS = frozenset({"moec.size", "aten._is_all_true.default"})
"""Ops that stay although nothing reads them. The second is an assertion (torch._check)."""


def _without_identities(graph: Graph) -> Graph:
    values: dict[Value, Value] = {}
    ops = []
    for op in graph.ops:
        inputs = tuple(values.get(value, value) for value in op.inputs)
        if op.name in _IDENTITIES and op.outputs[0].shape == inputs[0].shape:
            values[op.outputs[0]] = inputs[0]
        else:
            ops.append(replace(op, inputs=inputs))
    return replace(graph, ops=tuple(ops))


def _live(graph: Graph) -> list[Op]:
    """The ops on which the results depend, each behind its operands, in the order in which the
    results need them. Ops that bind a size or assert come first, in the order of the graph."""
    ops: dict[Op, None] = {}
    effects = [value for op in graph.ops if op.name in _EFFECTS for value in op.outputs]
    stack = [(value, False) for value in reversed((*effects, *graph.results))]
    while stack:
        value, ready = stack.pop()
        op = graph.producers.get(value)
        if op is None or op in ops:
            continue
        if ready:
            ops[op] = None
            continue
        stack.append((value, True))
        stack += [(operand, False) for operand in reversed(op.inputs)]
    return list(ops)


def _value(a: Value, b: Value, choice: Choice) -> Value:
    if a.dtype != b.dtype or len(a.shape) != len(b.shape):
        raise Unmergeable(f"{a} and {b}")
    shape = tuple(choice.size(x, y) for x, y in zip(a.shape, b.shape, strict=True))
    return Value(a.name, TensorType(a.dtype, shape))


def _attrs(a: Op, b: Op, choice: Choice) -> dict[str, Attr]:
    left, right = _arguments(a), _arguments(b)
    if left == right:
        return dict(a.attrs)
    if left.keys() != right.keys():
        raise Unmergeable(f"the arguments of {a}")
    sized = _sized_arguments(a.name)
    return {
        name: _attr(attr, right[name], choice if name in sized else None)
        for name, attr in left.items()
    }


def _arguments(op: Op) -> dict[str, Attr]:
    """Those of an op, without the start of a slice that is the first row: torch writes it where the
    end is a number."""
    first = op.name == "aten.slice.Tensor" and op.attrs.get("start") == 0
    return {name: attr for name, attr in op.attrs.items() if not (first and name == "start")}


def _attr(a: Any, b: Any, choice: Choice | None) -> Any:
    if type(a) is type(b) and a == b:
        return a
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return tuple(_attr(x, y, choice) for x, y in zip(a, b, strict=True))
    sizes = all(isinstance(x, int | sympy.Expr) and not isinstance(x, bool) for x in (a, b))
    if choice is None or not sizes:
        raise Unmergeable(f"{a} and {b}")
    return choice.size(a, b)


def _sized_arguments(name: str) -> Sequence[str]:
    """The arguments of an ATen operator that may be expressions of sizes."""
    if not name.startswith("aten."):
        return ()
    _, packet, overload = name.split(".")
    return _SIZED.findall(str(schema_of(getattr(getattr(torch.ops.aten, packet), overload))))
