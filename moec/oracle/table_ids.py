"""Inputs that are ids of rows in tables of the graph."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moec.ir.graph import Graph, Program, Value

_PASS_ON = (
    "aten.alias.default",
    "aten.reshape.default",
    "aten.clone.default",
    "aten._to_copy.default",
)


def table_rows(graph: Graph, value: Value) -> int:
    """The number of rows of the tables in which an input is looked up; 0 if there is none."""
    sizes = [table.shape[0] for table in _tables(graph, value)]
    return min((size for size in sizes if isinstance(size, int)), default=0)


def nonzero_rows(program: Program, value: Value) -> torch.Tensor:
    """The ids whose row in the table of an input is not all zero; all ids if every row is zero.

    Scores of a token whose row is all zero (padding) are all equal, and torch does not define which
    of equal scores its top-k chooses.
    """
    rows = table_rows(program.graph, value)
    table = next(iter(_tables(program.graph, value)), None)
    weight = None if table is None else program.weights.get(table.name)
    ids = torch.arange(rows)
    if weight is not None:
        nonzero = weight[:rows, :1].ne(0).any(-1)  # of most rows one element is enough
        rest = nonzero.logical_not().nonzero()[:, 0]
        nonzero[rest] = weight[rest].ne(0).any(-1)
        ids = ids[nonzero] if nonzero.any() else ids
    return ids


def _tables(graph: Graph, value: Value) -> Iterator[Value]:
    for op in graph.readers.get(value, ()):
        if op.name == "aten.embedding.default" and op.inputs[1] is value:
            yield op.inputs[0]
        elif op.name in _PASS_ON:
            yield from _tables(graph, op.outputs[0])
