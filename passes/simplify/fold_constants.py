"""Values that depend on weights alone are computed once, at compile time.

    inv = aten.reciprocal(theta)            ->   a weight called inv
    up = aten.slice(gate_up) <1, H, 2*H>    ->   a weight that shares gate_up's memory

A result is stored only where it costs no memory (a view) or little: an op whose result is larger
than its operands, and larger than `limit` bytes, stays in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from moec.interpret.evaluate import run_op
from moec.ir.dims import symbols
from moec.ir.graph import Op, Program, Stage, Value
from moec.ir.traits import is_reproducible
from moec.passes.core.rewrite import mentioned, rebuild
from moec.passes.core.runner import Log, Pass


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute what depends on weights alone; `limit` bytes bound what it may add."""

    limit: int = 1 << 20
    name: ClassVar[str] = "fold-constants"
    takes: ClassVar[Stage] = Stage.GROUPED
    gives: ClassVar[Stage] = Stage.ATEN

    def run(self, program: Program, log: Log) -> Program:
        graph = program.graph
        constants: dict[Value, torch.Tensor] = {
            p: program.weights[p.name] for p in graph.params if p.name in program.weights
        }
        params = {p: p for p in graph.params}
        new: dict[Value, Value] = {}
        ops: list[Op] = []
        for op in graph.ops:
            tensors = self.fold(op, constants) if _foldable(op, constants) else None
            if tensors is None or not log.spend(str(op)):
                ops.append(op)
                continue
            for value, tensor in zip(op.outputs, tensors, strict=True):
                constants[value] = tensor
                params[value] = value
        folded = rebuild(graph, ops, new, params=list(params))
        weights = {p.name: constants[p] for p in folded.params if p in constants}
        names = (state.before.name for state in graph.states)
        states = {n: program.weights[n] for n in names if n in program.weights}
        return Program(folded, weights | states)

    def fold(
        self, op: Op, constants: Mapping[Value, torch.Tensor]
    ) -> tuple[torch.Tensor, ...] | None:
        operands = [constants[v] for v in op.inputs]
        results = run_op(op, operands, {})
        sources = {t.untyped_storage().data_ptr() for t in operands}
        added = sum(
            t.numel() * t.element_size()
            for t in results
            if t.untyped_storage().data_ptr() not in sources
        )
        cost = sum(t.numel() * t.element_size() for t in operands)
        return results if added <= max(self.limit, 0 if "stack" not in op.name else cost) else None


def _foldable(op: Op, constants: Mapping[Value, torch.Tensor]) -> bool:
    constant = all(value in constants for value in op.inputs)
    sized = not any(symbols(dim) for value in op.outputs for dim in value.shape)
    return (
        constant
        and sized
        and not mentioned(op)
        and op.name.startswith("aten.")
        and op.name != "aten.alias.default"
        and is_reproducible(op.name)
    )
