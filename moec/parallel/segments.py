"""One rank's program as compiled segments with exchanges between them.

    graph in stage GROUPED  ->  segment, dist.all_to_all, segment, dist.all_to_all, …

A segment is what stands between two exchanges, as a function of one library. Exchanges, counts and
the few ops that only look up or add counts run in torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from moec.codegen.package import build, port
from moec.errors import UnsupportedError
from moec.interpret.evaluate import run_op
from moec.ir.dims import bind_shape, symbols
from moec.ir.graph import Graph, Module, Op, Program, Stage, Value
from moec.ir.opdef import Reference
from moec.passes.core.runner import run
from moec.pipeline import DECODE, LEVELS, LOWER
from moec.runtime.caches import Cache
from moec.runtime.executor import Executor
from moec.runtime.package import MAIN, grows
from moec.target.base import Target

_SMALL = ("aten.index_select.default", "aten.sum.default", "aten.reshape.default", "moec.size")


@dataclass(frozen=True)
class Segment:
    """A function of the library, and the values of the rank's graph that it takes and gives."""

    name: str
    program: Program


class RankModel:
    """One rank's program, compiled. Raises UnsupportedError for a state that is no cache of keys
    and values."""

    def __init__(self, program: Program, target: Target) -> None:
        for state in program.graph.states:
            if not grows(port(state.before)):
                raise UnsupportedError(
                    f"the state {state.before.name} is no cache of keys and values, and does not "
                    "run on several ranks"
                )
        passes = (*LOWER.at_level(max(LEVELS)), *DECODE.at_level(max(LEVELS)))
        self.program = run(program, passes, stage=Stage.MOE)[-1].program
        self.schedule = cut(self.program)
        parts = {item.name: item.program for item in self.schedule if isinstance(item, Segment)}
        self.executor = Executor(build(Module(parts), target)) if parts else None

    def __call__(
        self,
        inputs: Sequence[torch.Tensor],
        meanings: Mapping[str, Reference],
        caches: Sequence[Cache] = (),
    ) -> tuple[torch.Tensor, ...]:
        """The graph's outputs; writes `caches`, those of its states. Raises RankError where an
        exchange fails."""
        graph = self.program.graph
        states = [state.before for state in graph.states]
        held = dict(zip(states, caches, strict=True))
        sizes: dict[str, int] = {}
        for state, cache in held.items():
            bind_shape(state.shape, cache.array.shape, sizes)
        values: dict[Value, torch.Tensor] = {}

        def learn(value: Value, tensor: torch.Tensor) -> None:
            bind_shape(value.shape, tuple(tensor.shape), sizes)
            values[value] = tensor

        free = [value for value in graph.inputs if value not in held]
        for value, tensor in zip(free, inputs, strict=True):
            learn(value, tensor)
        values |= {param: self.program.weights[param.name] for param in graph.params}
        for item in self.schedule:
            if isinstance(item, Op):
                results = run_op(item, [values[v] for v in item.inputs], sizes, meanings)
                if item.name == "moec.size":
                    sizes[str(item.attrs["name"])] = int(results[0])
                outputs: Sequence[Value] = item.outputs
            else:
                assert self.executor is not None
                part = item.program.graph
                feeds = {v.name: values[v] for v in part.inputs if v not in held}
                written = [held[state.before] for state in part.states]
                arrays = self.executor(feeds, item.name, written)
                outputs, results = part.outputs, tuple(arrays[v.name] for v in part.outputs)
            for value, tensor in zip(outputs, results, strict=True):
                learn(value, tensor)
        return tuple(values[value] for value in graph.outputs)


def cut(program: Program) -> tuple[Segment | Op, ...]:
    """Ops that run in torch as they are, runs of others as segments, in order."""
    graph = program.graph
    runs: list[list[Op]] = [[]]
    for op in graph.ops:
        if op.name.startswith("dist.") or op.name == "moec.size":
            runs += [[op], []]
        else:
            runs[-1].append(op)
    schedule: list[Segment | Op] = []
    available: list[Value] = list(graph.inputs)
    for ops in filter(None, runs):
        if all(op.name.startswith("dist.") or op.name in _SMALL for op in ops):
            schedule += ops
        else:
            count = sum(isinstance(item, Segment) for item in schedule)
            name = f"segment_{count}" if count else MAIN
            schedule.append(Segment(name, _part(program, ops, available)))
        available += [value for op in ops for value in op.outputs]
    return tuple(schedule)


def _part(program: Program, ops: Sequence[Op], available: Sequence[Value]) -> Program:
    """The program of some ops: what they read from outside goes in, what others read comes out."""
    graph = program.graph
    again = _sorts(ops, graph)
    outputs = tuple(
        value
        for op in ops
        for value in op.outputs
        if value in graph.outputs or any(r not in ops for r in graph.readers.get(value, ()))
    )
    after = {state.after: state for state in graph.states}
    states = tuple(after[v] for op in ops for v in op.outputs if v in after)
    ops = [*again, *ops]
    inner = {value for op in ops for value in op.outputs}
    read = list(dict.fromkeys(v for op in ops for v in op.inputs if v not in inner))
    params = tuple(value for value in read if value in graph.params)
    inputs = [value for value in read if value not in params]
    inputs += _telling(ops, inputs, available)
    names = {str(s) for v in (*inputs, *inner) for dim in v.shape for s in symbols(dim)}
    bounds = {name: bound for name, bound in graph.bounds.items() if name in names}
    befores = {state.before for state in states}
    inputs = [*(v for v in inputs if v not in befores), *(s.before for s in states)]
    part = Graph(tuple(inputs), params, tuple(ops), outputs, states, bounds)
    return Program(part, {param.name: program.weights[param.name] for param in params})


def _sorts(ops: Sequence[Op], graph: Graph) -> list[Op]:
    """The sorts outside of `ops` whose slots its sums read: the kernel of a sum wants the sort
    beside it, and sorting again is cheaper than an exchange by far."""
    sorts: dict[Op, None] = {}
    for op in ops:
        if op.name != "moe.combine":
            continue
        chain: list[Op] = []
        value = op.inputs[1]
        while (source := graph.producers.get(value)) is not None and source not in ops:
            chain.insert(0, source)
            if source.name in ("moe.sort", "moe.dispatch"):
                sorts |= dict.fromkeys(chain)
                break
            value = source.inputs[0]
    return list(sorts)


def _telling(ops: Sequence[Op], inputs: Sequence[Value], available: Sequence[Value]) -> list[Value]:
    """Further values, read for their sizes alone: one for each size that no input has."""
    used = {s for op in ops for v in (*op.inputs, *op.outputs) for d in v.shape for s in symbols(d)}
    told = {str(dim) for v in inputs for dim in v.shape if isinstance(dim, sympy.Symbol)}
    more: list[Value] = []
    for name in sorted(set(map(str, used)) - told):
        more.append(next(v for v in available if any(str(dim) == name for dim in v.shape)))
    return list(dict.fromkeys(more))
