"""A graph for pictures, in which fused additions and norms are back in their modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moec.ir.graph import Graph, Op

_NORMS = {"rms": "nn.rms_norm", "layer": "aten.layer_norm.default"}


def unfused(graph: Graph) -> Graph:
    """The graph with an addition and a norm for each nn.add_norm. The norm is in the module of its
    weight. The result cannot be evaluated: its ops lack attributes."""
    return replace(graph, ops=tuple(part for op in graph.ops for part in _parts(op)))


def _parts(op: Op) -> Iterator[Op]:
    if op.name != "nn.add_norm" or len(op.inputs) < 2 or len(op.outputs) != 2:
        yield op
        return
    (x, residual, *weights), (total, normalised) = op.inputs, op.outputs
    yield Op("aten.add.Tensor", (x, residual), (total,), origin=op.origin)
    origin = weights[0].name.rpartition(".")[0] if weights else op.origin
    name = _NORMS.get(str(op.attrs.get("kind")), op.name)
    yield Op(name, (total, *weights), (normalised,), origin=origin or op.origin)
