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


def with_requirements(
    graph: Graph, weights: Mapping[str, torch.Tensor], written: Mapping[Op, str]
) -> Graph:
    """The graph with these requirements; `written` are the ops that had another name."""
    ranges = ValueRanges(graph, weights)
    asserted = {
        ids: (rows, op)
        for ids, rows, op in _asserted(graph)
        if not ranges.inside(IndexUse(ids, rows))
    }
    writes = {
        op: use
        for op in written
        for use in index_uses(op)
        if not ranges.inside(replace(use, negative=False))
    }
    if not asserted and not writes:
        return graph
    names = {value.name for value in graph.values()}
    inside: dict[Value, Value] = {}
    ops: list[Op] = []

    def require(ids: Value, rows: Dim, what: str, op: Op) -> Value:
        name = f"{ids.name}_required"
        while name in names:
            name += "_"
        names.add(name)
        attrs: Any = {"rows": rows, "negative": False, "what": what}
        output = Value(name, ids.type)
        ops.append(Op(REQUIRE, (ids,), (output,), attrs, None, op.origin, op.line))
        return output

    conditions = {op for op in graph.ops if op.name in ("aten.ge.Scalar", "aten.lt.Scalar")}
    for op in graph.ops:
        values = dict(inside) if op not in conditions else {}
        for ids in op.inputs:
            if ids in asserted and ids not in inside and op not in conditions:
                rows, _ = asserted[ids]
                inside[ids] = values[ids] = require(ids, rows, _description("one_hot", op), op)
        if op in writes and writes[op].ids not in values:
            ids = writes[op].ids
            values[ids] = require(ids, writes[op].size, _description(written[op], op), op)
        inputs = tuple(values.get(value, value) for value in op.inputs)
        ops.append(op if inputs == op.inputs else replace(op, inputs=inputs))
    return replace(graph, ops=tuple(ops))


def _asserted(graph: Graph) -> Iterator[tuple[Value, Dim, Op]]:
    """Ids of which the export asserts that they are at least 0, and less than a number of classes:
    `not any(not ids < n)`, which nothing reads."""
    natural = {op.inputs[0] for op in graph.ops if _bounds(graph, op, "aten.ge.Scalar", 0)}
    for op in graph.ops:
        rows: Any = op.attrs.get("other")
        if _bounds(graph, op, "aten.lt.Scalar", rows) and op.inputs[0] in natural:
            yield op.inputs[0], rows, op


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


def _description(name: str, op: Op) -> str:
    where = op.line or op.origin
    return f"{name} ({where})" if where else name
