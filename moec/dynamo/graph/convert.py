"""Converts a traced ATen graph to Graph[ATEN], and maps its values to the nodes they came from.

Passes keep the order of a graph's outputs. So the graph is canonicalised with every value as an
output, which shows what each value became. Afterwards the outputs are only those that nodes outside
the graph read, as recognisers expect. A node without an op in the IR (a random number, an unknown
operator) becomes an input of the graph.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from moec.capture.conversion.dropped_nodes import dropped
from moec.capture.conversion.node_converter import Converter, origin
from moec.errors import CaptureError
from moec.ir.aten import IR_DTYPES
from moec.ir.graph import Graph, Program, Value
from moec.ir.sizes.dims import Bounds, from_torch, symbols
from moec.passes.core.rewrite import drop_dead
from moec.passes.core.runner import run
from moec.passes.simplify.canonicalise import Canonicalise
from moec.passes.simplify.share_common import ShareCommon
from moec.runtime.device.device import CPU, CUDA
from moec.torch_private import (
    ConstantSource,
    DimDynamic,
    OpOverload,
    StatefulSymbolicContext,
    TracingContext,
    schema_of,
)


@dataclass(frozen=True)
class TracedProgram:
    """`nodes` maps values of the program's graph to the first node with the same content."""

    program: Program
    nodes: Mapping[Value, fx.Node]


def convert(module: fx.GraphModule, static: Mapping[fx.Node, torch.Tensor]) -> TracedProgram:
    """The IR of a traced graph. `static` maps the inputs that become params to their tensors; a
    node without an IR op becomes an input of the IR."""
    converter = Converter({}, module, _prefix(module))
    inputs: list[Value] = []
    params: list[Value] = []
    weights: dict[str, torch.Tensor] = {}
    leaves: dict[Value, fx.Node] = {}

    def leaf(node: fx.Node, into: list[Value]) -> None:
        tensor = node.meta.get("val")
        if isinstance(tensor, torch.Tensor) and tensor.dtype in IR_DTYPES and _dense(tensor):
            try:
                tensor_type = converter.type(tensor, node.name)
            except CaptureError:  # a size like log2(T): what reads the node stays outside too
                return
            value = Value(converter.fresh(node.name), tensor_type)
            into.append(value)
            leaves[value] = node
            converter.values[node] = value

    for node in module.graph.nodes:
        val = node.meta.get("val")
        if node.op == "placeholder" and isinstance(val, torch.SymInt | int):
            converter.values[node] = from_torch(val)
        elif node.op in ("placeholder", "get_attr"):
            leaf(node, params if node in static else inputs)
            if node in static and node in converter.values:
                weights[converter.values[node].name] = static[node]
        elif node.op == "call_function" and not dropped(node):
            if not _convertible(node, converter):
                leaf(node, inputs)
                continue
            try:
                converter.node(node)
            except CaptureError:
                leaf(node, inputs)
    tied = {
        node: value
        for node, value in converter.values.items()
        if isinstance(value, Value) and node.op == "call_function" and value not in leaves
    }
    read = {n for node in module.graph.nodes if node not in tied for n in node.all_input_nodes}
    names = {
        name for v in (*inputs, *params, *_converted_values(converter)) for name in _symbols(v)
    }
    bounds = {name: Bounds() for name in sorted(names)}
    graph = Graph(
        tuple(inputs), tuple(params), tuple(converter.ops), tuple(tied.values()), (), bounds
    )
    spelled = run(Program(graph, weights), (Canonicalise(), ShareCommon()))[-1].program.graph
    nodes = dict(leaves)
    for value, node in zip(spelled.outputs, tied, strict=True):
        nodes.setdefault(value, node)
    outside = [v for v, node in zip(spelled.outputs, tied, strict=True) if node in read]
    live_graph = drop_dead(replace(spelled, outputs=tuple(dict.fromkeys(outside))))
    return TracedProgram(
        Program(live_graph, {p.name: weights[p.name] for p in live_graph.params}), nodes
    )


def _prefix(module: fx.GraphModule) -> str:
    """Dynamo's name of the compiled module, such as L['self']; empty if no node's origin has
    one."""
    matches = (re.match(r"L\['\w+'\]", origin(node)) for node in module.graph.nodes)
    return next((match.group() for match in matches if match), "")


def _convertible(node: fx.Node, converter: Converter) -> bool:
    """Whether the IR has an op for the node, and values for all of its inputs."""
    if any(source not in converter.values for source in node.all_input_nodes):
        return False
    if not isinstance(node.target, OpOverload):
        # Arithmetic of sizes, or `getitem`, which unpacks a tuple.
        return node.target is operator.getitem or not isinstance(node.meta.get("val"), torch.Tensor)
    supported = node.target.namespace in ("aten", "moec") and not schema_of(node.target).is_mutable
    return supported and torch.Tag.nondeterministic_seeded not in node.target.tags


def _dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type in (CPU, CUDA)


def _converted_values(converter: Converter) -> list[Value]:
    return [value for op in converter.ops for value in op.outputs]


def _symbols(value: Value) -> set[str]:
    return {name for dim in value.shape for name in symbols(dim)}


Run = Callable[..., Any]


def take_local_parts(
    module: fx.GraphModule, inputs: Sequence[Any]
) -> tuple[list[Any], tuple[int, ...]]:
    """(inputs, numbers): the inputs with local parts instead of tensors of which the graph takes
    only the parts, and the positions of these inputs. The graph is changed accordingly."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    new, numbers = list(inputs), []
    for number, (node, value) in enumerate(zip(placeholders, inputs, strict=True)):
        users = list(node.users)
        if not (users and hasattr(value, "to_local") and all(map(_takes_part, users))):
            continue
        for key in ("example_value", "val"):
            if key in users[0].meta:
                node.meta[key] = users[0].meta[key]
        for user in users:
            user.replace_all_uses_with(node)
            module.graph.erase_node(user)
        new[number] = value.to_local().detach().requires_grad_(value.requires_grad)
        _fix_sizes(new[number], node.name)
        numbers.append(number)
    if numbers:
        module.graph.lint()
        module.recompile()
    return new, tuple(numbers)


def _fix_sizes(part: torch.Tensor, name: str) -> None:
    """Marks the sizes of a weight as constant, even if `dynamic` makes those of inputs symbolic."""
    contexts: Any = TracingContext.get().tensor_to_context
    contexts[part] = StatefulSymbolicContext(
        dynamic_sizes=[DimDynamic.STATIC] * part.ndim, tensor_source=ConstantSource(name)
    )


def _takes_part(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "to_local" and len(node.args) == 1


def with_parts(run: Run, numbers: tuple[int, ...]) -> Run:
    """`run` with the inputs at `numbers` replaced by their local parts."""
    return partial(_with_parts, run, frozenset(numbers)) if numbers else run


def _with_parts(run: Run, numbers: frozenset[int], *inputs: torch.Tensor) -> Any:
    return run(*(x.to_local() if n in numbers else x for n, x in enumerate(inputs)))  # type: ignore[attr-defined]
