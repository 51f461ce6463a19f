"""Values that depend on weights alone are computed once, at compile time.

    inv = aten.reciprocal(theta)            ->   a weight called inv
    up = aten.slice(gate_up) <1, H, 2*H>    ->   a weight that shares gate_up's memory
    w = aten.add(aten.mul(w0, a), aten.mul(w1, b))   ->   a weight that takes the place of two

A result is stored where it adds little memory: it is a view, or has at most `limit` bytes, or
belongs to a part of the graph whose results are no larger than the weights that only this part
reads. Other results, such as weights that are stored in fewer bits than they are used in, are
computed by the graph in each call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch

from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import Graph, Op, Program, Stage, Value
from moec.ir.interpret.evaluate import run_op
from moec.ir.sizes.dims import symbols
from moec.ir.traits import VIEWS, is_reproducible
from moec.passes.core.rewrite import rebuild, sizes_in
from moec.passes.core.runner import Log, Pass

_SHARING = (VIEWS - {"aten.clone.default"}) | {
    "aten.expand.default",
    "aten.permute.default",
    "aten.select.int",
    "aten.slice.Tensor",
}
"""Ops whose result shares the memory of their operand."""


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute values that depend on weights alone; a result may add at most `limit` bytes."""

    limit: int = 1 << 20
    name: ClassVar[str] = "fold-constants"
    gives: ClassVar[Stage] = Stage.ATEN

    def run(self, program: Program, log: Log) -> Program:
        graph = program.graph
        constants: dict[Value, torch.Tensor] = {
            p: program.weights[p.name] for p in graph.params if p.name in program.weights
        }
        params = {p: p for p in graph.params}
        lighter = _shrinking_values(graph, constants)
        uses = Counter((*(value for op in graph.ops for value in op.inputs), *graph.results))
        ops: list[Op] = []
        for op in graph.ops:
            tensors = None
            if _foldable(op, constants):
                tensors = self.fold(op, constants, always=op.outputs[0] in lighter)
            if tensors is None or not log.spend(str(op)):
                ops.append(op)
                continue
            for value, tensor in zip(op.outputs, tensors, strict=True):
                constants[value] = log.memory.tensor(tensor)
                params[value] = value
            uses.subtract(op.inputs)
            for value in {*op.inputs} & lighter:  # large, and no longer read
                if not uses[value]:
                    del constants[value]
        folded = rebuild(graph, ops, {}, params=list(params))
        weights = {p.name: constants[p] for p in folded.params if p in constants}
        names = (state.before.name for state in graph.states)
        states = {n: program.weights[n] for n in names if n in program.weights}
        return Program(folded, weights | states)

    def fold(
        self, op: Op, constants: Mapping[Value, torch.Tensor], *, always: bool
    ) -> tuple[torch.Tensor, ...] | None:
        """The results of `op`, or None if they would add too much."""
        operands = [constants[v] for v in op.inputs]
        results = run_op(op, operands, {})
        sources = {t.untyped_storage().data_ptr() for t in operands}
        added = sum(
            t.numel() * t.element_size()
            for t in results
            if t.untyped_storage().data_ptr() not in sources
        )
        cost = sum(t.numel() * t.element_size() for t in operands)
        limit = max(self.limit, 0 if "stack" not in op.name else cost)
        return results if always or added <= limit else None


def _foldable(op: Op, constants: Mapping[Value, torch.Tensor]) -> bool:
    return all(value in constants for value in op.inputs) and _is_fixed(op)


def _is_fixed(op: Op) -> bool:
    """Whether equal operands give equal results of sizes that are known."""
    sized = not any(symbols(dim) for value in op.outputs for dim in value.shape)
    return (
        sized
        and not sizes_in(op)
        and op.name.startswith("aten.")
        and op.name != "aten.alias.default"
        and is_reproducible(op.name)
    )


def _shrinking_values(graph: Graph, weights: Mapping[Value, torch.Tensor]) -> set[Value]:
    """The values of those parts of the graph that depend on weights alone and whose results are no
    larger than the weights that only the part reads."""
    determined: dict[Value, Op] = {}
    for op in graph.ops:
        if op.inputs and all(v in weights or v in determined for v in op.inputs) and _is_fixed(op):
            determined |= dict.fromkeys(op.outputs, op)
    inner = {id(op) for op in determined.values()}
    results = {*graph.results}

    def read_outside(value: Value) -> bool:
        return value in results or any(id(op) not in inner for op in graph.readers.get(value, ()))

    lighter: set[Value] = set()
    for part in _connected(determined):
        replaced = {v for v in part if v in weights and not read_outside(v)}
        stored = {_memory_of(v, determined) for v in part if v in determined and read_outside(v)}
        added = sum(map(_bytes, (v for v in stored if v in determined or v in replaced)))
        if added <= sum(map(_bytes, replaced)):
            lighter |= part & determined.keys()
    return lighter


def _connected(determined: Mapping[Value, Op]) -> Iterator[set[Value]]:
    """The connected components: sets of values that are joined by ops, operands included."""
    parts: dict[Value, set[Value]] = {}
    for output, op in determined.items():
        for value in op.inputs:
            one, other = (parts.setdefault(v, {v}) for v in (output, value))
            if one is not other:
                smaller, part = sorted((one, other), key=len)
                part |= smaller
                parts |= dict.fromkeys(smaller, part)
    yield from {id(part): part for part in parts.values()}.values()


def _memory_of(value: Value, determined: Mapping[Value, Op]) -> Value:
    """The value whose memory `value` uses: the operand of its views, or itself."""
    while value in determined and determined[value].name in _SHARING:
        value = determined[value].inputs[0]
    return value


def _bytes(value: Value) -> int:
    return prod(map(int, value.shape)) * TORCH_DTYPES[value.dtype].itemsize
