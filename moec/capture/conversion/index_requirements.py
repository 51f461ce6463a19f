"""Requirements on indices that an export asserts, or loses as it is decomposed.

one_hot(ids, n)             an assertion that ids are from 0 to n - 1, and a comparison
x.index_add(0, ids, y)      index_put, which counts negative ids from the end; index_copy too

Where the range of the ids does not follow from how they are computed, such a reader reads
moec.require_index(ids) instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from moec.ir.graph import Graph, Op, Value
from moec.ir.index_uses import REQUIRE, IndexUse, index_uses
from moec.ir.sizes.dims import Dim
from moec.ir.value_ranges import ValueRanges

_NOT = "aten.logical_not.default"
_ANY = frozenset({"aten.any.default", "aten.any.dims"})


def with_asserted(graph: Graph, weights: Mapping[str, torch.Tensor]) -> Graph:
    """The graph with the requirements of one_hot: after the other side of a branch on sizes was
    joined, since the ranges of the ids may follow on one side only."""
    ranges = ValueRanges(graph, weights)
    needed = {
        ids: IndexUse(ids, rows)
        for ids, rows in _asserted(graph)
        if not ranges.inside(IndexUse(ids, rows))
    }
    conditions = ("aten.ge.Scalar", "aten.lt.Scalar")
    uses = {
        op: {ids: (needed[ids], "one_hot") for ids in op.inputs if ids in needed}
        for op in graph.ops
        if op.name not in conditions
    }
    return _required(graph, uses) if needed else graph


def with_written(
    graph: Graph, weights: Mapping[str, torch.Tensor], written: Mapping[Op, str]
) -> Graph:
    """The graph with the requirements of index_add and index_copy; `written` are the ops that had
    these names."""
    ranges = ValueRanges(graph, weights)
    uses = {
        op: {use.ids: (use, name)}
        for op, name in written.items()
        for use in index_uses(op)
        if not ranges.inside(replace(use, negative=False))
    }
    return _required(graph, uses) if uses else graph


def _required(graph: Graph, uses: Mapping[Op, Mapping[Value, tuple[IndexUse, str]]]) -> Graph:
    """The graph in which each of these ops reads its indices after a requirement."""
    names = {value.name for value in graph.values()}
    inside: dict[IndexUse, Value] = {}
    ops: list[Op] = []
    for op in graph.ops:
        values: dict[Value, Value] = {}
        for ids, (use, name) in uses.get(op, {}).items():
            if use not in inside:
                check = _requirement(use, f"{name}{_where(op)}", op, names)
                ops.append(check)
                (inside[use],) = check.outputs
            values[ids] = inside[use]
        inputs = tuple(values.get(value, value) for value in op.inputs)
        ops.append(op if inputs == op.inputs else replace(op, inputs=inputs))
    return replace(graph, ops=tuple(ops))


def _requirement(use: IndexUse, what: str, op: Op, names: set[str]) -> Op:
    name = f"{use.ids.name}_required"
    while name in names:
        name += "_"
    names.add(name)
    attrs: Any = {"rows": use.size, "negative": False, "what": what}
    return Op(REQUIRE, (use.ids,), (Value(name, use.ids.type),), attrs, None, op.origin, op.line)


def _where(op: Op) -> str:
    where = op.line or op.origin
    return f" ({where})" if where else ""


def _asserted(graph: Graph) -> Iterator[tuple[Value, Dim]]:
    """Ids of which the export asserts that they are at least 0, and less than a number of classes:
    `not any(not ids < n)`, which nothing reads."""
    natural = {op.inputs[0] for op in graph.ops if _bounds(graph, op, "aten.ge.Scalar", 0)}
    for op in graph.ops:
        rows: Any = op.attrs.get("other")
        if _bounds(graph, op, "aten.lt.Scalar", rows) and op.inputs[0] in natural:
            yield op.inputs[0], rows


def _bounds(graph: Graph, op: Op, name: str, other: Any) -> bool:
    if op.name != name or op.attrs.get("other") != other:
        return False
    for expected in ({_NOT}, _ANY, {_NOT}):
        readers = graph.readers.get(op.outputs[0], ())
        following = [reader for reader in readers if reader.name in expected]
        if len(following) != 1 or op.outputs[0] in graph.results:
            return False
        (op,) = following
    return not graph.readers.get(op.outputs[0]) and op.outputs[0] not in graph.results
