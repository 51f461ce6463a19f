"""Cuts a rank's graph into segments, with exchanges between them.

    graph in stage GROUPED  ->  segment, dist.all_to_all, segment, dist.all_to_all, …

A segment has the ops between two exchanges, compiled as a function of a library. Exchanges, counts
and the few ops that only look up or add counts run in torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import sympy

from moec.ir.graph import Graph, Op, Value
from moec.ir.ops.experts.dispatch import SORTS
from moec.ir.sizes.dims import parse_dim, symbols
from moec.runtime.package import MAIN

_SMALL = ("aten.index_select.default", "aten.sum.default", "aten.reshape.default", "moec.size")


@dataclass(frozen=True)
class Segment:
    """A function of the library; its graph's inputs and outputs are values of the rank's graph."""

    name: str
    graph: Graph


def cut(graph: Graph) -> tuple[Segment | Op, ...]:
    """In order: ops that run in torch, and segments of consecutive other ops."""
    runs: list[list[Op]] = [[]]
    for op in graph.ops:
        if op.name.startswith("dist.") or op.name == "moec.size":
            runs += [[op], []]
        else:
            runs[-1].append(op)
    repeated = [_sorts(ops, graph) for ops in runs]
    keys = {v for sorts in repeated for v in _read(sorts)}
    schedule: list[Segment | Op] = []
    available: list[Value] = list(graph.inputs)
    for ops, sorts in zip(runs, repeated, strict=True):
        if not ops:
            continue
        if all(op.name.startswith("dist.") or op.name in _SMALL for op in ops):
            schedule += ops
        else:
            count = sum(isinstance(item, Segment) for item in schedule)
            name = f"segment_{count}" if count else MAIN
            schedule.append(Segment(name, _part(graph, ops, sorts, keys, available)))
        available += [value for op in ops for value in op.outputs]
    return tuple(schedule)


def _part(
    graph: Graph,
    ops: Sequence[Op],
    again: Sequence[Op],
    keys: Collection[Value],
    available: Sequence[Value],
) -> Graph:
    """The graph of some ops: inputs are read from outside, outputs are read by others. The sorts
    `again` of other segments are repeated; `keys` are read by such sorts in any segment."""
    outputs = tuple(
        value
        for op in ops
        for value in op.outputs
        if value in graph.outputs
        or value in keys
        or any(r not in ops for r in graph.readers.get(value, ()))
    )
    after = {state.after: state for state in graph.states}
    states = tuple(after[v] for op in ops for v in op.outputs if v in after)
    ops = [*again, *ops]
    inner = {value for op in ops for value in op.outputs}
    read = _read(ops)
    params = tuple(value for value in read if value in graph.params)
    inputs = [value for value in read if value not in params]
    inputs += _size_sources(ops, inputs, available)
    names = {str(s) for v in (*inputs, *inner) for dim in v.shape for s in symbols(dim)}
    bounds = {
        size: limits
        for size, limits in graph.bounds.items()
        if {str(s) for s in symbols(parse_dim(size))} <= names
    }
    befores = {state.before for state in states}
    inputs = [*(v for v in inputs if v not in befores), *(s.before for s in states)]
    return Graph(tuple(inputs), params, tuple(ops), outputs, states, bounds)


def _read(ops: Sequence[Op]) -> list[Value]:
    """What ops read that none of them computes."""
    inner = {value for op in ops for value in op.outputs}
    return list(dict.fromkeys(v for op in ops for v in op.inputs if v not in inner))


def _sorts(ops: Sequence[Op], graph: Graph) -> list[Op]:
    """The sorts outside of `ops` whose slots a sum in `ops` reads. The kernel of a sum needs the
    sort in its segment, and sorting again is much cheaper than an exchange."""
    sorts: dict[Op, None] = {}
    for op in ops:
        if op.name != "moe.combine":
            continue
        chain: list[Op] = []
        value = op.inputs[1]
        while (source := graph.producers.get(value)) is not None and source not in ops:
            chain.insert(0, source)
            if source.name in SORTS:
                sorts |= dict.fromkeys(chain)
                break
            value = source.inputs[0]
    return list(sorts)


def _size_sources(
    ops: Sequence[Op], inputs: Sequence[Value], available: Sequence[Value]
) -> list[Value]:
    """Additional values, read only for their sizes: one for each size that no input has."""
    used = {s for op in ops for v in (*op.inputs, *op.outputs) for d in v.shape for s in symbols(d)}
    known_sizes = {str(dim) for v in inputs for dim in v.shape if isinstance(dim, sympy.Symbol)}
    names = sorted(set(map(str, used)) - known_sizes)
    more = (next(v for v in available if name in map(str, v.shape)) for name in names)
    return list(dict.fromkeys(more))
