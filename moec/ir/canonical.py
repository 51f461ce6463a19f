"""Graphs under canonical names, so that equal text means equal computation."""

from __future__ import annotations

from dataclasses import replace

from moec.ir.graph import Graph, Value
from moec.ir.text import print_graph


def canonical_text(graph: Graph) -> str:
    """A text that is equal for two graphs exactly if they have the same ops on the same inputs, up
    to the names of values and the origins of ops."""
    return print_graph(without_origins(graph))


def without_origins(graph: Graph) -> Graph:
    """The graph with canonical names, and no origins and lines."""
    new: dict[Value, Value] = {}

    def name(value: Value) -> Value:
        return new.setdefault(value, Value(f"v{len(new)}", value.type))

    inputs = tuple(map(name, graph.inputs))
    params = tuple(map(name, graph.params))
    ops = []
    for op in graph.ops:
        read = tuple(map(name, op.inputs))
        body = without_origins(op.body) if op.body is not None else None
        written = tuple(map(name, op.outputs))
        ops.append(replace(op, inputs=read, outputs=written, body=body, origin="", line=""))
    outputs = tuple(map(name, graph.outputs))
    return Graph(inputs, params, tuple(ops), outputs, (), graph.bounds)
