"""Finds the region of each block in Graph[MOE]: the ops from its input to its result.

    logits = aten.linear(x, router)                 x ─▶ ┌─────────────────┐
    weights, experts = moe.route(logits)                 │ one region: the │
    rows, order, ends = moe.dispatch(x, experts)    ───▶ │ program of one  │ ─▶ y
    out = moe.experts(rows, ends, stacks...)             │ kernel call     │
    y = moe.combine(out, order, weights)                 └─────────────────┘

A region holds the ops between x and y, and ops on weights only. A value that y needs but that does
not depend on x (the logits of a router that reads another value) is also an input. Inner values
that others read too, such as logits that the model returns, are computed again outside; they are
small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import sympy
from torch import fx

from moec.dynamo.graph.convert import TracedProgram
from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, Program, Value
from moec.ir.ops.experts.dispatch import chooses_all
from moec.ir.replace_sizes import replace_sizes
from moec.ir.sizes.dims import Bounds, canonical, symbol, symbols
from moec.ir.sizes.floats import is_float
from moec.ir.traits import VIEWS
from moec.passes.recognise.region import Scope, unlike
from moec.report.data import WHOLE


@dataclass(frozen=True)
class Region:
    """`inputs` and `params` are nodes of the traced graph; the region computes `output`."""

    where: str
    program: Program
    inputs: tuple[fx.Node, ...]
    params: tuple[fx.Node, ...]
    output: fx.Node

    def inside(self) -> Iterator[fx.Node]:
        """The nodes that the output depends on, down to the inputs; params are included."""
        pending, visited = [self.output], set(self.inputs)
        while pending:
            node = pending.pop()
            if node not in visited:
                visited.add(node)
                yield node
                pending += node.all_input_nodes


def regions(
    converted: TracedProgram, recognised: Program
) -> Iterator[Region | tuple[str, NoMatch]]:
    """For each block its region, or its name and the reason why it has none."""
    graph = recognised.graph
    scope = Scope(graph, recognised.weights)
    nodes = dict(converted.nodes)
    shared = _of_several_gates(scope)
    for op in graph.ops:
        if op.name in ("moe.combine", "moe.soft_mixture"):
            where = op.origin.removesuffix(".experts") or WHOLE
            try:
                if op in shared:
                    raise NoMatch("several gates weigh its experts, which would run for each")
                y, stood = _result(op, converted.program.graph, graph)
                if stood not in nodes:
                    raise NoMatch("its result is not a value of the traced graph")
                nodes[y] = nodes[stood]
                yield _region(where, op, y, scope, recognised, nodes)
            except NoMatch as why:
                yield where, why


def _of_several_gates(scope: Scope) -> set[Op]:
    """The sums of blocks in which every token uses every expert, and an expert is used by another
    such block on the same rows. A region has one result, so each would run the expert."""
    graph, users = scope.graph, dict[tuple[Value, Value], list[Op]]()
    for experts in graph.ops:
        if experts.name != "moe.experts":
            continue
        dispatch = graph.producers[experts.inputs[1]]
        if dispatch.name != "moe.dispatch" or not chooses_all(graph, dispatch):
            continue
        stacks = experts.inputs[2:]
        x, above = scope.source_of(dispatch.inputs[0]), scope.upstream(stacks)
        for weight in {*stacks, *(v for op in above for v in op.inputs)} & set(scope.params):
            sums = [r for r in graph.readers[experts.outputs[0]] if r.name == "moe.combine"]
            users.setdefault((x, weight), []).extend(sums)
    return {op for sums in users.values() if len(sums) > 1 for op in sums}


def _region(
    where: str,
    combine: Op,
    y: Value,
    scope: Scope,
    recognised: Program,
    nodes: Mapping[Value, fx.Node],
) -> Region:
    graph = scope.graph
    x = _source(combine, scope, nodes)
    ops = tuple(map(unlike, _region_ops(x, y, scope, nodes)))
    results = {value for op in ops for value in op.outputs}
    read = list(dict.fromkeys(v for op in ops for v in op.inputs if v not in results))
    params = tuple(v for v in read if v in scope.params)
    inputs = tuple(v for v in read if v not in scope.params)
    cut = _free_sizes(Graph(inputs, params, ops, (y,), (), graph.bounds))
    if any(map(is_float, y.shape)):
        raise NoMatch(f"{y.name} is {y.type}, a size that is computed in floats")
    weights = {param.name: recognised.weights[param.name] for param in params}
    return Region(
        where,
        Program(cut, weights),
        tuple(nodes[v] for v in inputs),
        tuple(nodes[v] for v in params),
        nodes[y],
    )


def _result(combine: Op, before: Graph, after: Graph) -> tuple[Value, Value]:
    """The block's result in `after`, and the value of `before` that it replaces.

    Recognition changes only the inputs of ops that read a block. Raises NoMatch where nothing reads
    the result.
    """
    readers = {value: op for op in before.ops for value in op.outputs}
    pending = [combine.outputs[0]]
    for value in pending:
        for index, output in enumerate(after.outputs):
            if output is value:
                return value, before.outputs[index]
        for op in after.readers.get(value, ()):
            old = readers.get(op.outputs[0])
            renamed = op.name == "aten.alias.default"  # to the output that the block computes
            if old is None or (renamed and old.name != op.name):
                pending.append(op.outputs[0])
            elif old.inputs != op.inputs:
                index = op.inputs.index(value)
                return value, old.inputs[index]
    raise NoMatch("nothing reads its result")


def _source(combine: Op, scope: Scope, nodes: Mapping[Value, fx.Node]) -> Value:
    """The block's input before it was flattened: the value behind the most views that has a node.
    Raises NoMatch where no such value has one."""
    value = combine.inputs[0]
    if combine.name == "moe.combine":
        experts = scope.graph.producers[value]
        while experts.name != "moe.experts":
            experts = scope.graph.producers[experts.inputs[0]]
        value = scope.graph.producers[experts.inputs[0]].inputs[0]
    source = value if value in nodes else None
    while (view := scope.made_by(value, *VIEWS)) is not None:
        value = view.inputs[0]
        source = value if value in nodes else source
    if source is None:
        raise NoMatch("its input is not a value of the traced graph")
    return source


def _region_ops(x: Value, y: Value, scope: Scope, nodes: Mapping[Value, fx.Node]) -> tuple[Op, ...]:
    """The ops of the region, in order."""
    above = scope.upstream([y], [x])
    inside: set[Op] = set()
    reached = {x}
    for op in above:
        fixed = bool(op.inputs) and scope.constants.issuperset(op.inputs)
        free = not op.inputs
        if fixed or free or op.name.startswith("moe.") or reached.intersection(op.inputs):
            inside.add(op)
            if not (fixed or free):
                reached.update(op.outputs)
    # Values that an op of the block reads from outside need a node; else their ops are included.
    pending = [value for op in inside for value in op.inputs]
    while pending:
        value = pending.pop()
        maker = scope.maker(value)
        if maker is None or maker in inside or value in nodes or value is x:
            continue
        inside.add(maker)
        pending += maker.inputs
    return tuple(op for op in above if op in inside)


def _free_sizes(graph: Graph) -> Graph:
    """The region with fresh size names that its inputs' axes determine: T0 replaces B where an
    input has an axis B, and B*S where no input has B and S."""
    dims = [dim for value in graph.inputs for dim in value.shape if not isinstance(dim, int)]
    alone = {dim for dim in dims if isinstance(dim, sympy.Symbol)}
    names = {str(dim) for dim in alone}
    free = [dim for dim in dict.fromkeys(dims) if dim in alone or not symbols(dim) <= names]
    new = {dim: symbol(f"T{index}") for index, dim in enumerate(free)}
    products = sorted(new, key=lambda dim: dim in alone)  # products before their factors
    pairs = [(dim, new[dim]) for dim in products]
    renamed = replace_sizes(graph, lambda size: canonical(size.subs(pairs)))
    size_names = {str(name) for name in new.values()}
    for value in renamed.values():
        for dim in value.shape:
            if not symbols(dim) <= size_names:
                raise NoMatch(f"{value.name} is {value.type}, and none of its inputs has this size")
    return replace(renamed, bounds={name: Bounds() for name in sorted(size_names)})
