"""Drops the shared expert of a layer: the dense network that is added to the routed experts.

    y = moe.combine(…)                             y = moe.combine(…)
    s = aten.linear(…x…, w2)                ->
    z = aten.add(y, s)                             z = aten.add(y, mean[D])      or z = y

What is left of it is the mean of its results on the data, or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moec.errors import NoMatch
from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import Graph, Op, Program, Value
from moec.ir.traits import is_elementwise
from moec.passes.core.moe_layer import MOVES, Layer, Splice

LINEAR, ADD = "aten.linear.default", "aten.add.Tensor"
SHARED = "#shared"
"""The end of the name of a shared expert, after that of its layer."""
_PARTS = (LINEAR, *MOVES, "aten.slice.Tensor", "aten.split_with_sizes.default", "nn.rms_norm")


@dataclass(frozen=True, eq=False)
class SharedExpert:
    """The shared expert of a layer: `add` adds its `result` to the `routed` experts' one, and the
    linear layers that only it needs have these `origins`."""

    name: str
    add: Op
    routed: Value
    result: Value
    origins: frozenset[str] = frozenset()


def shared_expert_of(program: Program, layer: Layer) -> SharedExpert:
    """The layer's shared expert. Raises NoMatch where it has none, or where others need a part."""
    shared = _added(program.graph, layer)
    after = drop_shared(program, shared, None).graph
    before = [op for op in program.graph.ops if op.name == LINEAR]
    removed = [op for op in before if op not in set(after.ops)]
    if not removed:
        raise NoMatch("no linear layer is the shared expert's alone")
    for op in removed:
        if set(op.inputs[1:]) & set(after.params):
            raise NoMatch(f"a weight of the shared expert is also read elsewhere: {op.origin}")
    origins = {op.origin for op in removed}
    if origins & {op.origin for op in after.ops if op.name in (LINEAR, "moe.experts")}:
        raise NoMatch("a module computes products of the shared expert and others")
    return replace(shared, origins=frozenset(origins))


def drop_shared(program: Program, shared: SharedExpert, mean: torch.Tensor | None) -> Program:
    """The program with `mean` [D] in place of the shared expert's results, or without them."""
    splice, add = Splice(program), shared.add
    if mean is None:
        ops = [Op("aten.alias.default", (shared.routed,), add.outputs, {}, None, add.origin)]
    else:
        stored = mean.to(TORCH_DTYPES[shared.result.dtype])
        ops = [replace(add, inputs=(shared.routed, splice.weight(f"{shared.name}.mean", stored)))]
    splice.put(add, ops)
    return splice.done()


def _added(graph: Graph, layer: Layer) -> SharedExpert:
    x, value = _source(graph, layer.dispatch.inputs[0]), layer.output
    while value not in graph.results and len(readers := graph.readers.get(value, ())) == 1:
        (op,) = readers
        if op.name not in (*MOVES, ADD) or len(set(op.inputs)) < len(op.inputs):
            break
        for other in op.inputs:
            fits = other.shape == value.shape and value.type == op.outputs[0].type
            plain = op.name == ADD and op.attrs.get("alpha", 1) == 1
            if other is not value and plain and fits and _is_dense(graph, other, x):
                return SharedExpert(f"{layer.name}{SHARED}", op, value, other)
        value = op.outputs[0]
    raise NoMatch("it has no shared expert: nothing dense of its input is added to its result")


def _source(graph: Graph, value: Value) -> Value:
    """The value that reshapes and casts brought into this form."""
    op = graph.producers.get(value)
    return value if op is None or op.name not in MOVES else _source(graph, op.inputs[0])


def _is_dense(graph: Graph, result: Value, x: Value) -> bool:
    """Whether linear layers and elementwise ops compute `result` from `x` and stored weights."""
    waiting, linears, computed = [result], 0, set[Value]()
    while waiting:
        value = waiting.pop()
        if value in computed or value in graph.params or _source(graph, value) is x:
            continue
        op = graph.producers.get(value)
        if op is None or not (op.name in _PARTS or is_elementwise(op.name)):
            return False
        computed.update(op.outputs)
        linears += op.name == LINEAR
        waiting += op.inputs
    return linears > 0
