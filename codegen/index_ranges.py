"""The values that an integer input may hold, because it indexes the rows of a table."""

from __future__ import annotations

from collections.abc import Iterator

import sympy

from moec.codegen.loops.rules import EMIT
from moec.dtypes import INDEX_DTYPES
from moec.ir.graph import Graph, Op, Value
from moec.ir.index_uses import REQUIRE, index_uses
from moec.ir.sizes.dims import Dim, canonical, show_dim
from moec.runtime.package import Size


def index_ranges(graph: Graph) -> dict[str, tuple[Size, Size]]:
    """The least and the greatest value of each integer input of which all elements index tables:
    numbers, or sizes as text where a table's size varies. Eager refuses any other value.

    An input is followed through ops that only move or copy elements, and through checks.
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


def moved_from(graph: Graph, value: Value) -> Value:
    """The value whose elements `value` has, after ops that only move or copy them, and checks."""
    producer = graph.producers.get(value)
    while producer is not None and _moves(producer):
        (value,) = producer.inputs
        producer = graph.producers.get(value)
    return value


def _moves(op: Op) -> bool:
    rule = EMIT.get(op.name)
    moves = rule is not None and rule.point is not None and rule.cost == 0
    return (moves or op.name == REQUIRE) and len(op.inputs) == 1


def _limits(graph: Graph, value: Value) -> Iterator[tuple[Dim, Dim]]:
    """The least and the greatest value of an input in each of its uses as an index."""
    waiting, visited = [value], {value}
    while waiting:
        for op in graph.readers.get(waiting.pop(), ()):
            for use in index_uses(op):
                if use.ids in visited:
                    yield (-use.size if use.negative else 0), use.size - 1
            if _moves(op) and op.outputs[0] not in visited:
                visited.update(op.outputs)
                waiting += op.outputs


def _size(dim: Dim) -> Size:
    return dim if isinstance(dim, int) else show_dim(dim)
