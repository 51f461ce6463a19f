"""Graph -> TVM Relax: one function, every group of ops a call to one kernel.

Ops that a rule of the backend takes become calls of its kernels; all others are fused into
loops (loops/). Kernels are deduplicated by structure across layers and functions, and work for
every size within the bounds.
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
"""Held while Relax is written: TVM keeps the open builders of all threads on one stack."""


@dataclass(frozen=True)
class LoweredModule:
    """`module` has a function for each program, which takes the caller's inputs, the states, then
    its weights: `params`, by the function's name. `kernels` pairs the origin of each op of the
    first program with the kernel that computes it, `refusals` say why others have none. `tunable`
    are the kernels that another tuning would change.
    """

    module: tvm.IRModule
    params: Mapping[str, tuple[Param, ...]]
    kernels: tuple[tuple[str, str], ...]
    refusals: tuple[Refusal, ...] = ()
    tunable: tuple[Tunable, ...] = ()


def lower(
    module: Module, target: Target, backend: Backend, tunings: Tunings = MappingProxyType({})
) -> LoweredModule:
    """`tunings` are values of kernels by their key; others have the default.

    Raises UnsupportedError, listing every op that has no kernel and every unknown size.
    """
    with BUILDERS:
        # A kernel may not have the name of a function: `route` is the name of both.
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
    """Add the function of a graph; its params in their order."""
    rules = selection.rules
    reasons = {refusal.op: refusal.reason for refusal in selection.refusals}
    check(graph, rules.__contains__, reasons)
    shaped = {name for v in graph.values() for name in names(*v.shape)}
    # A number that is read from data may be compared or multiplied, and be no tensor's size.
    read = {str(op.attrs["name"]) for op in graph.ops if op.name == "moec.size"}
    sizes = Sizes({name: tirx.Var(name, "int64") for name in sorted(shaped | read)})
    low = Lowering(graph, target, kernels, sizes, selection)
    # The caller's own inputs, then the states in their order.
    before = [state.before for state in graph.states]
    ordered = [*(v for v in graph.inputs if v not in before), *before]
    inputs = [relax.Var(v.name, low.type(v)) for v in ordered]
    low.values |= dict(zip(ordered, inputs, strict=True))
    builder = kernels.builder
    with builder.function(name):
        with builder.dataflow():
            for group in partition(graph, rules.__contains__):
                if all(value in low.values for value in group.root.outputs):
                    continue  # made beside another op
                rule = rules.get(group.root)
                results = low.group(group) if rule is None else rule.emit(low, group.root)
                low.values |= dict(zip(group.root.outputs, results, strict=True))
            results = [builder.emit_output(low.value(v)) for v in graph.results]
        params = [var for _, var in low.params.values()]
        builder.emit_func_output(relax.Tuple(results), [*inputs, *params])
    return tuple(param for param, _ in low.params.values())
