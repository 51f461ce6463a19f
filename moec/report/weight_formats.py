"""The formats of the weights of a graph, by what reads them."""

from __future__ import annotations

from moec.ir.graph import Graph
from moec.ir.ops.experts.quantised_linear import QUANTISED_OPS, matrices_of
from moec.passes.quantise.quantise_linears import LINEARS, heads

Formats = dict[str, dict[str, str]]


def code_bits(graph: Graph) -> dict[str, int]:
    """The bits in which each code of a quantised weight is stored, by the name of the codes."""
    quantised = [op for op in graph.ops if op.name in QUANTISED_OPS]
    return {s.matrix.codes.name: s.format.bits for op in quantised for s in matrices_of(op)}


def weight_formats(graph: Graph) -> Formats:
    """By kind, the format of each weight. Those that ops of two kinds read, such as tied
    embeddings, are of both."""
    kinds: Formats = {}
    params, last = set(graph.params), heads(graph)
    for op in graph.ops:
        names = {value.name: value.dtype for value in op.inputs if value in params}
        for stored in matrices_of(op) if op.name in QUANTISED_OPS else ():
            names |= {value.name: str(stored.format) for value in stored.matrix.values}
        kind = "other weights"
        if op.name.startswith("grouped."):
            kind = "experts"
        elif op.name in LINEARS:
            kind = "head" if op in last else "linears"
        if names:
            kinds.setdefault(kind, {}).update(names)
    return dict(sorted(kinds.items()))
