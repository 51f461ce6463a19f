"""A traced ATen graph -> Graph[ATEN], whose values stay tied to the nodes that they came from.

Passes keep the order of a graph's outputs. So everything is spelled canonically once with every
value as an output, which tells what each became; then the outputs are only what the world
outside reads, as recognisers want it. A node that the IR has no words for (a random number, an
operator of somebody else's) is an input of the graph.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from moec.capture.node_converter import Converter, dropped, origin
from moec.errors import CaptureError
from moec.ir.aten import IR_DTYPES
from moec.ir.dims import Bounds, from_torch, symbols
from moec.ir.graph import Graph, Program, Value
from moec.passes.core.rewrite import drop_dead
from moec.passes.core.runner import run
from moec.passes.simplify.canonicalise import Canonicalise
from moec.passes.simplify.share_common import ShareCommon


@dataclass(frozen=True)
class Converted:
    """`nodes` holds, for values of the program's graph, the first node that has their content."""

    program: Program
    nodes: Mapping[Value, fx.Node]


def convert(module: fx.GraphModule, static: Mapping[fx.Node, torch.Tensor]) -> Converted:
    """`static` holds the inputs that become params, with their contents."""
    converter = Converter({}, module, _prefix(module))
    inputs: list[Value] = []
    params: list[Value] = []
    weights: dict[str, torch.Tensor] = {}
    leaves: dict[Value, fx.Node] = {}

    def leaf(node: fx.Node, into: list[Value]) -> None:
        tensor = node.meta.get("val")
        if isinstance(tensor, torch.Tensor) and tensor.dtype in IR_DTYPES and _dense(tensor):
            value = Value(converter.fresh(node.name), converter.type(tensor, node.name))
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
            if not _known(node, converter):
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
    names = {name for v in (*inputs, *params, *_made(converter)) for name in _symbols(v)}
    bounds = {name: Bounds() for name in sorted(names)}
    graph = Graph(
        tuple(inputs), tuple(params), tuple(converter.ops), tuple(tied.values()), (), bounds
    )
    spelled = run(Program(graph, weights), (Canonicalise(), ShareCommon()))[-1].program.graph
    nodes = dict(leaves)
    for value, node in zip(spelled.outputs, tied, strict=True):
        nodes.setdefault(value, node)
    outside = [v for v, node in zip(spelled.outputs, tied, strict=True) if node in read]
    kept = drop_dead(replace(spelled, outputs=tuple(dict.fromkeys(outside))))
    return Converted(Program(kept, {p.name: weights[p.name] for p in kept.params}), nodes)


def _prefix(module: fx.GraphModule) -> str:
    """What Dynamo calls the module that it was given, such as L['self']."""
    found = (re.match(r"L\['\w+'\]", origin(node)) for node in module.graph.nodes)
    return next((match.group() for match in found if match), "")


def _known(node: fx.Node, converter: Converter) -> bool:
    """Whether the IR has words for the node, and for all that it reads."""
    if any(source not in converter.values for source in node.all_input_nodes):
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        # Arithmetic of sizes; `getitem` takes a tuple apart.
        return node.target is operator.getitem or not isinstance(node.meta.get("val"), torch.Tensor)
    known = node.target.namespace in ("aten", "moec") and not node.target._schema.is_mutable
    return known and torch.Tag.nondeterministic_seeded not in node.target.tags


def _dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type == "cpu"


def _made(converter: Converter) -> list[Value]:
    return [value for op in converter.ops for value in op.outputs]


def _symbols(value: Value) -> set[str]:
    return {name for dim in value.shape for name in symbols(dim)}
