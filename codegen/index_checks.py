"""Where a graph uses indices that may be outside of their axis, it requires that they are inside.

    y = aten.gather(x, ids)   becomes   inside = moec.require_index(ids) <rows=4>
                                        y = aten.gather(x, inside)

Eager raises there; a kernel would use the nearest row. No check is needed for indices whose range
follows from the op that makes them, as from a topk; for elements of an input, which the runtime
looks at before the call (index_ranges.py); and for results of moec's ops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from moec.codegen.index_ranges import moved_from
from moec.ir.graph import Graph, Op, Value
from moec.ir.index_uses import REQUIRE, IndexUse, index_uses
from moec.ir.value_ranges import ValueRanges


def with_index_checks(graph: Graph, weights: Mapping[str, torch.Tensor]) -> Graph:
    """The graph with a check of all indices that need one. Checks that it has already, and that are
    not needed, are left out."""
    ranges = ValueRanges(graph, weights)
    inputs = frozenset(graph.inputs) - {state.before for state in graph.states}

    def trusted(use: IndexUse) -> bool:
        source = moved_from(graph, use.ids)
        producer = graph.producers.get(source)
        if producer is None:
            return source in inputs or ranges.inside(use)
        of_moec = not producer.name.startswith("aten.") and producer.name != REQUIRE
        return of_moec or ranges.inside(use)

    names = {value.name for value in graph.values()}
    ops: list[Op] = []
    replaced: dict[Value, Value] = {}
    checked: dict[IndexUse, Value] = {}
    for op in graph.ops:
        if op.name == REQUIRE:
            (use,) = index_uses(op)
            if trusted(use):
                replaced[op.outputs[0]] = replaced.get(op.inputs[0], op.inputs[0])
                continue
        needed = {use.ids: use for use in index_uses(op) if op.name != REQUIRE and not trusted(use)}
        inside = dict(replaced)
        for ids, use in needed.items():
            if use not in checked:
                check = _check(op, use, replaced.get(ids, ids), names)
                ops.append(check)
                checked[use] = check.outputs[0]
            inside[ids] = checked[use]
        changed = any(value in inside for value in op.inputs)
        values = tuple(inside.get(value, value) for value in op.inputs)
        ops.append(replace(op, inputs=values) if changed else op)
    if not checked and not replaced:
        return graph
    outputs = tuple(replaced.get(value, value) for value in graph.outputs)
    states = tuple(
        replace(state, after=replaced.get(state.after, state.after)) for state in graph.states
    )
    return replace(graph, ops=tuple(ops), outputs=outputs, states=states)


def _check(op: Op, use: IndexUse, ids: Value, names: set[str]) -> Op:
    stem = f"{ids.name}_inside"
    name, count = stem, 1
    while name in names:
        count += 1
        name = f"{stem}_{count}"
    names.add(name)
    attrs = {"rows": use.size, "negative": use.negative, "what": description(op)}
    return Op(REQUIRE, (ids,), (Value(name, ids.type),), attrs, None, op.origin, op.line)


def description(op: Op) -> str:
    """An op that uses indices, for messages: with the user's line where it is known."""
    name = op.name.removeprefix("aten.").split(".")[0]
    where = op.line or op.origin
    return f"{name} ({where})" if where else name
