"""The values that an integer input may hold, because it indexes the rows of a table."""

from __future__ import annotations

from collections.abc import Iterator

import sympy

from moec.codegen.loops.rules import EMIT
from moec.dtypes import INDEX_DTYPES
from moec.ir.aten import named
from moec.ir.graph import Graph, Op, Value
from moec.ir.sizes.dims import Dim, canonical, show_dim
from moec.runtime.package import Size


def index_ranges(graph: Graph) -> dict[str, tuple[Size, Size]]:
    """The least and the greatest value of each integer input of which all elements index tables:
    numbers, or sizes as text where a table's size varies. Eager refuses any other value.

    An input is followed through ops that only move or copy elements.
    """
    ranges: dict[str, tuple[Size, Size]] = {}
    for value in graph.inputs:
        if value.dtype not in INDEX_DTYPES:
            continue
        limits = list(_limits(graph, value))
        if limits:
            low = canonical(sympy.Max(*(low for low, _ in limits)))
            high = canonical(sympy.Min(*(high for _, high in limits)))
            ranges[value.name] = (_size(low), _size(high))
    return ranges


def _limits(graph: Graph, value: Value) -> Iterator[tuple[Dim, Dim]]:
    """The least and the greatest value of an input in each of its uses as an index."""
    waiting, visited = [value], {value}
    while waiting:
        for op in graph.readers.get(waiting.pop(), ()):
            for ids, rows, negative in _lookups(op):
                if ids in visited:
                    yield (-rows if negative else 0), rows - 1
            rule = EMIT.get(op.name)
            moves = rule is not None and rule.point is not None and rule.cost == 0
            if moves and len(op.inputs) == 1 and op.outputs[0] not in visited:
                visited.update(op.outputs)
                waiting += op.outputs


def _lookups(op: Op) -> Iterator[tuple[Value, Dim, bool]]:
    """The indices that an op reads, the length of the axis that each indexes, and whether negative
    ones count from its end."""
    if op.name == "aten.embedding.default":
        yield named(op)["indices"], named(op)["weight"].shape[0], False
    elif op.name in ("aten.index_select.default", "aten.gather.default"):
        arguments = named(op)
        table, axis = arguments["self"], arguments["dim"]
        if table.shape:
            yield arguments["index"], table.shape[axis], False
    elif op.name == "aten.index.Tensor":
        arguments = named(op)
        for axis, ids in enumerate(arguments["indices"]):
            if ids is not None:
                yield ids, arguments["self"].shape[axis], True


def _size(dim: Dim) -> Size:
    return dim if isinstance(dim, int) else show_dim(dim)
