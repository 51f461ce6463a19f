"""Partitions the graph into groups of ops that share a loop; each group becomes one kernel.

Ops are visited from the results backwards, so the groups of all readers are known. A point op joins
its readers if they are in one group and read it at few positions. Ops that only move elements are
copied into every reader. Any other op becomes the root of its own group, and its result is stored.
No path leaves a group and returns to it, because all readers of a fused op are in the group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moec.codegen.loops.moves.reshape import only_splits
from moec.codegen.loops.rules import EMIT, LoopRule
from moec.ir.aten import named
from moec.ir.graph import Graph, Op, Value
from moec.ir.sizes.dims import Dim, product

# Limits of one loop: ops, and positions at which one op is computed.
MOST_OPS = 48
MOST_PLACES = 4
PIECES = 4  # a concatenation of more pieces is not fused


@dataclass(eq=False)
class FusionGroup:
    """`ops` in topological order, the root last; `inputs` in the order of first use."""

    root: Op
    ops: list[Op] = field(default_factory=list)
    inputs: tuple[Value, ...] = ()


def partition(graph: Graph, own_kernel: Callable[[Op], bool]) -> list[FusionGroup]:
    """Groups in an order in which they can run. Each op for which `own_kernel` is true is a
    group."""
    results = set(graph.results)
    groups: dict[Op, list[FusionGroup]] = {}
    positions: dict[tuple[Op, FusionGroup], frozenset[object]] = {}
    all_groups: list[FusionGroup] = []
    cheap_chain = _cheap_to_repeat(graph)
    for op in reversed(graph.ops):
        rule = None if own_kernel(op) else EMIT.get(op.name)
        joined = None
        if rule is not None and rule.point is not None and not results.intersection(op.outputs):
            joined = _readers(graph, op, rule, groups, positions, cheap_chain, own_kernel)
        if joined is None:
            group = FusionGroup(op)
            all_groups.append(group)
            joined = {group: frozenset([()])}
        groups[op] = list(joined)
        for group, at in joined.items():
            positions[op, group] = at
            group.ops.append(op)
    for group in all_groups:
        group.ops.reverse()
    _undo_free_views(graph, all_groups)
    for group in all_groups:
        inside = {value for op in group.ops for value in op.outputs}
        inputs = dict.fromkeys(v for op in group.ops for v in op.inputs if v not in inside)
        group.inputs = tuple(inputs)
    order = {op: number for number, op in enumerate(graph.ops)}
    return sorted(all_groups, key=lambda group: order[group.root])


def _readers(
    graph: Graph,
    op: Op,
    rule: LoopRule,
    groups: Mapping[Op, list[FusionGroup]],
    positions: Mapping[tuple[Op, FusionGroup], frozenset[object]],
    cheap_chain: Mapping[Op, bool],
    own_kernel: Callable[[Op], bool],
) -> dict[FusionGroup, frozenset[object]] | None:
    """The groups that would compute `op`, with the positions at which each reads it; None if the
    result of `op` must be stored."""
    free = rule.cost == 0 or cheap_chain[op]
    if rule.view and not only_splits(op):
        return None
    if op.name in ("aten.cat.default", "aten.stack.default") and len(op.inputs) > PIECES:
        return None
    readers: dict[FusionGroup, set[object]] = {}
    for value in op.outputs:
        for reader in dict.fromkeys(graph.readers.get(value, ())):
            if not _may_fuse(value, reader, own_kernel):
                return None
            reading = EMIT[reader.name]
            for group in groups[reader]:
                if reader is not group.root and reader not in group.ops:
                    return None
                for position in positions[reader, group]:
                    same = reading.same_position and value.shape == reader.outputs[0].shape
                    here = position if same else (reader, value, position)
                    readers.setdefault(group, set()).add(here)
    if not readers or (len(readers) > 1 and not free):
        return None
    for group, at in readers.items():
        if len(at) > (2 * MOST_PLACES if free else MOST_PLACES) or len(group.ops) >= MOST_OPS:
            return None
        if not free and _repeats(op, group):
            return None
    return {group: frozenset(at) for group, at in readers.items()}


def _may_fuse(value: Value, reader: Op, own_kernel: Callable[[Op], bool]) -> bool:
    rule = EMIT.get(reader.name)
    if rule is None or own_kernel(reader):
        return False
    if rule.view and not only_splits(reader):
        return False  # a view of a stored value is free
    if rule.kernel is not None:
        if not rule.fuses:
            return False
        stored: list[object] = []
        for name, argument in named(reader).items():
            if name not in rule.fuses:
                stored += argument if isinstance(argument, tuple) else [argument]
        return not any(value is a for a in stored)
    return rule.point is not None


def _repeats(op: Op, group: FusionGroup) -> bool:
    """Whether the group would compute more elements than `op` has."""
    root = group.root
    domain = root.outputs[0].shape
    if EMIT[root.name].kernel is not None and EMIT[root.name].point is None and root.inputs:
        domain = root.inputs[0].shape
    elements = product(op.outputs[0].shape)
    return (
        elements != 1
        and _live(op.outputs[0].shape) != _live(domain)
        and elements != product(domain)
    )


def _live(shape: tuple[Dim, ...]) -> list[Dim]:
    return [dim for dim in shape if dim != 1]


def _cheap_to_repeat(graph: Graph) -> dict[Op, bool]:
    """For each op, whether it is a few additions on sizes and constants, such as a comparison of
    aranges."""
    costs: dict[Op, int] = {}
    cheap: dict[Op, bool] = {}
    for op in graph.ops:
        rule = EMIT.get(op.name)
        cost = 1000
        if rule is not None and rule.point is not None and not rule.view:
            feeding = [graph.producers.get(v) for v in op.inputs]
            if all(source is not None for source in feeding):
                cost = rule.cost + sum(costs[source] for source in feeding if source is not None)
        costs[op] = min(cost, 1000)
        cheap[op] = cost <= 4
    return cheap


def _undo_free_views(graph: Graph, all_groups: list[FusionGroup]) -> None:
    """Makes views of stored values separate groups: they are free, unlike a copy in a loop. Changes
    `all_groups`."""
    stored = {*graph.inputs, *graph.params}
    stored.update(v for group in all_groups for v in group.root.outputs)
    group_of: dict[Op, FusionGroup] = {group.root: group for group in all_groups}
    for op in graph.ops:
        rule = EMIT.get(op.name)
        if rule is None or not rule.view or op in group_of or op.inputs[0] not in stored:
            continue
        group_of[op] = FusionGroup(op, [op])
        stored.update(op.outputs)
    free = {op for op in group_of if (rule := EMIT.get(op.name)) is not None and rule.view}
    for group in all_groups:
        group.ops = [op for op in group.ops if op is group.root or op not in free]
    all_groups += [group for op, group in group_of.items() if group not in all_groups]
