"""Graph -> TVM Relax: one function, in which every group of ops is a call of one kernel.

Ops with a rule of the backend become calls of its kernels; all others are fused into loops
(loops/). Kernels are shared by structure across layers and functions, and work for every size
within the bounds.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import tvm
from tvm import relax, tirx

from moec.codegen.backend import Backend, Refusal, Selection
from moec.codegen.fusion import partition
from moec.codegen.loops.index import Sizes, names
from moec.codegen.module_builder import Lowering, ModuleBuilder, Param
from moec.codegen.tuning.tunable import Tunable, Tunings
from moec.codegen.unsupported import check
from moec.errors import UnsupportedError
from moec.ir.graph import Graph, Module
from moec.target.base import Target

BUILDERS = threading.Lock()
"""Held while Relax is built: TVM keeps the open builders of all threads on one stack."""


@dataclass(frozen=True)
class LoweredModule:
    """The Relax module of some programs. `module` has a function per program, whose arguments are
    the caller's inputs, the states, then its weights: `params`, by the function's name. `kernels`
    pairs the origin of each op of the first program with its kernel; `refusals` are the reasons of
    ops without one. `tunable` are the kernels that tuning can change."""

    module: tvm.IRModule
    params: Mapping[str, tuple[Param, ...]]
    kernels: tuple[tuple[str, str], ...]
    refusals: tuple[Refusal, ...] = ()
    tunable: tuple[Tunable, ...] = ()


def lower(
    module: Module, target: Target, backend: Backend, tunings: Tunings = MappingProxyType({})
) -> LoweredModule:
    """The Relax module of `module`. `tunings` are values of kernels by their key; others have the
    default.

    Raises UnsupportedError that lists every op without a kernel and every unknown size.
    """
    with BUILDERS:
        # A kernel may not have the name of a function; `route` would be both.
        kernels = ModuleBuilder(
            relax.BlockBuilder(), backend, name_counts=Counter(module), tunings=tunings
        )
        params: dict[str, tuple[Param, ...]] = {}
        origins: tuple[tuple[str, str], ...] = ()
        refusals: dict[Refusal, None] = {}
        for name in module:
            graph = module[name].graph
            selection = backend.select(graph)
            refusals |= dict.fromkeys(selection.refusals)
            params[name] = _function(name, graph, target, kernels, selection)
            origins = origins or tuple(kernels.sites)
        tunable = tuple(kernels.tunable.values())
        return LoweredModule(kernels.builder.finalize(), params, origins, tuple(refusals), tunable)


def supported(graph: Graph, backend: Backend) -> bool:
    """Whether every op and every size of the graph can be compiled."""
    try:
        check(graph, backend.select(graph).rules.__contains__)
    except UnsupportedError:
        return False
    return True


def _function(
    name: str, graph: Graph, target: Target, kernels: ModuleBuilder, selection: Selection
) -> tuple[Param, ...]:
    """Adds the function of a graph; returns its params in order."""
    rules = selection.rules
    reasons = {refusal.op: refusal.reason for refusal in selection.refusals}
    check(graph, rules.__contains__, reasons)
    shaped = {name for v in graph.values() for name in names(*v.shape)}
    # A number read from data may be compared or multiplied without being the size of a tensor.
    read = {str(op.attrs["name"]) for op in graph.ops if op.name == "moec.size"}
    sizes = Sizes({name: tirx.Var(name, "int64") for name in sorted(shaped | read)})
    low = Lowering(graph, target, kernels, sizes, selection)
    # The caller's inputs first, then the states in order.
    before = [state.before for state in graph.states]
    ordered = [*(v for v in graph.inputs if v not in before), *before]
    inputs = [relax.Var(v.name, low.type(v)) for v in ordered]
    low.values |= dict(zip(ordered, inputs, strict=True))
    builder = kernels.builder
    with builder.function(name):
        with builder.dataflow():
            for group in partition(graph, rules.__contains__):
                if all(value in low.values for value in group.root.outputs):
                    continue  # emitted together with another op
                rule = rules.get(group.root)
                results = low.group(group) if rule is None else rule.emit(low, group.root)
                low.values |= dict(zip(group.root.outputs, results, strict=True))
            results = [builder.emit_output(low.value(v)) for v in graph.results]
        params = [var for _, var in low.params.values()]
        builder.emit_func_output(relax.Tuple(results), [*inputs, *params])
    return tuple(param for param, _ in low.params.values())
