"""The work of a call of a kernel: arithmetic, and the bytes that it has to read and write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from moec.ir.graph import Graph, Op, Value
from moec.ir.sizes.dims import evaluate_dim
from moec.profile.cost import Cost, Env, op_cost, size_of
from moec.profile.record import Run
from moec.runtime.call.profile import SortedRows, TimedCall
from moec.runtime.package import KernelCall

PASSES_OVER = ("nn.rms_norm", "nn.add_norm", "moe.combine", "moe.sort")
"""Ops that read all of their inputs, and are no products."""
GROUPED = ("grouped.linear", "grouped.quantised", "grouped.mixed", "grouped.compressed")


@dataclass(frozen=True)
class KernelCost:
    """The cost of a call, on average over repetitions; None where it is not known. `at_most`: the
    weights of all experts that rows could have chosen are counted. `ops` are names of ops."""

    cost: Cost | None
    at_most: bool
    ops: tuple[str, ...]


def work_of(site: KernelCall, number: int, graph: Graph, runs: Sequence[Run]) -> KernelCost:
    """The work of the call `number` of a function, for the arguments that were watched in runs."""
    named = _by_output(graph)
    ops = tuple(named[name] for name in site.ops if name in named)
    names = tuple(op.name for op in ops)
    if not ops or len(ops) < len(site.ops):
        return KernelCost(None, False, names)
    costs, at_most = [], False
    for run in runs:
        for call in run:
            cost, unknown = _cost(ops, number, graph, call)
            if cost is None:
                return KernelCost(None, False, names)
            costs.append(cost)
            at_most |= unknown
    total = sum(costs, Cost())
    return KernelCost(Cost(total.flops / len(runs), total.bytes / len(runs)), at_most, names)


@cache
def _by_output(graph: Graph) -> dict[str, Op]:
    """Ops by the name of their first output."""
    return {op.outputs[0].name: op for op in graph.ops}


@cache
def _params(graph: Graph) -> frozenset[Value]:
    return frozenset(graph.params)


def _cost(
    ops: Sequence[Op], number: int, graph: Graph, call: TimedCall
) -> tuple[Cost | None, bool]:
    """The cost of a kernel that computes `ops`, and whether it is an upper bound."""
    params, at_most = _params(graph), False
    env: Env = call.sizes
    held = {state.before for state in graph.states}
    inside = {value for op in ops for value in op.outputs}
    total, read = Cost(), set[Value]()
    for op in ops:
        rows = None
        if op.name in GROUPED:
            rows, unknown = _rows(op, env, call.sorted_rows[number])
            at_most |= unknown
        cost = op_cost(op, env, call.context, params, rows)
        if cost is None and op.name not in PASSES_OVER:
            return None, False
        total += cost or Cost(0, sum(size_of(v, env) for v in op.inputs if v in params))
        keys_and_values = op.inputs[1:3] if op.name == "nn.attention" else ()
        read.update(v for v in op.inputs if v not in keys_and_values)
    read -= {*params, *held, *inside}
    moved = sum(size_of(value, env) for value in (*read, *inside))
    return total + Cost(0, moved), at_most


def _rows(op: Op, env: Env, candidates: Sequence[SortedRows]) -> tuple[SortedRows, bool]:
    """The rows of experts by an argument of the kernel; where none has them, with as many experts
    as there could be, and True."""
    experts = evaluate_dim(op.inputs[1].shape[0], env)
    rows = evaluate_dim(op.outputs[0].shape[0], env)
    fitting = [each for each in candidates if each.experts == experts and each.rows <= rows]
    if fitting:
        return max(fitting, key=lambda each: each.rows), False
    return SortedRows(experts, rows, min(experts, rows)), True
