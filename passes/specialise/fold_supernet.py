"""Weights that a supernet mixes from several become one weight, for a given architecture.

    r = softmax(linear(relu(linear(arch, w1)), w2))       arch is [0.5, 1, …]
    w = sum_i r_i * experts[i, :H, :D]             ->     w: a weight [H, D]
    y = aten.linear(x, w)                                 y = aten.linear(x, w)

Mixture-of-Supernets (arXiv 2306.04845): the experts of a supernet are mixed before the product,
layer by layer or neuron by neuron, by routers that read the numbers of an architecture alone.
Once it is chosen, no router and no mixture is left, and the layer has the size of the sub-network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from moec.ir.graph import Graph, Op, Program, Stage, Value
from moec.ir.stats import stored_bytes
from moec.passes.core.options import Given
from moec.passes.core.runner import Log, Pass
from moec.passes.specialise.bind_inputs import bind, seeds
from moec.passes.specialise.fold_known import fold_known
from moec.passes.specialise.token_invariant import TokenInvariantAnalysis

_MIXES = ("mul", "mm", "bmm", "matmul", "linear", "sum", "add")


@dataclass(frozen=True)
class FoldSupernet(Pass):
    """Mix the weights of a supernet for one architecture, bound here or stored in the model."""

    inputs: Given = field(
        default_factory=dict, metadata={"says": "an input that selects the architecture"}
    )
    name: ClassVar[str] = "fold-supernet"
    takes: ClassVar[Stage] = Stage.ATEN
    gives: ClassVar[Stage] = Stage.ATEN
    source: ClassVar[str] = "Mixture-of-Supernets, arXiv 2306.04845"

    @property
    def binds(self) -> Given:
        return self.inputs

    def run(self, program: Program, log: Log) -> Program:
        """Raises UsageError for an input that the model lacks, or that cannot have that value."""
        before = stored_bytes(program)
        program = bind(program, self.inputs, self.name)
        graph = program.graph
        stored = {p: program.weights[p.name] for p in graph.params if p.name in program.weights}
        constants = TokenInvariantAnalysis(program, {**stored, **seeds(program)}).constants
        mixed: dict[Value, torch.Tensor] = {}
        for op, value in _mixed_weights(graph):
            if value in constants:
                mixed[value] = constants[value]
                continue
            names = ", ".join(v.name for v in graph.inputs if v in _leaves(graph, value))
            log.decline(
                op.origin or str(op), f"its weight is mixed by {names}: bind that input too"
            )
        bound = {value: constants[value] for value in constants if _is_bound(graph, value)}
        program = fold_known(program, {**mixed, **bound}, log)
        fewer = before - stored_bytes(program)
        log.says.append(f"{len(mixed)} mixed weights and biases; {fewer:,} bytes of weights fewer")
        return program


def _mixed_weights(graph: Graph) -> list[tuple[Op, Value]]:
    """The weights and biases of linear layers that are sums or products of others."""
    weights = []
    for op in graph.ops:
        if op.name == "aten.linear.default":
            for value in op.inputs[1:]:
                kinds = {p.name.split(".")[1] for p in _ops_of(graph, value)}
                if kinds & set(_MIXES):
                    weights.append((op, value))
    return weights


def _ops_of(graph: Graph, value: Value) -> set[Op]:
    ops: set[Op] = set()
    waiting = [value]
    while waiting:
        op = graph.producers.get(waiting.pop())
        if op is not None and op not in ops:
            ops.add(op)
            waiting += op.inputs
    return ops


def _leaves(graph: Graph, value: Value) -> set[Value]:
    return {v for op in _ops_of(graph, value) for v in op.inputs}


def _is_bound(graph: Graph, value: Value) -> bool:
    """Whether a value depends on a bound input."""
    return any(op.name == "moec.bound" for op in _ops_of(graph, value))
