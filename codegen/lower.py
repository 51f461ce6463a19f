"""Graph -> TVM Relax: one function, in which every group of ops is a call of one kernel.

Ops with a rule of the backend become calls of its kernels; all others are fused into loops
(loops/). Kernels are shared by structure across layers and functions, and work for every size
within the bounds.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
import tvm
from tvm import relax, tirx

from moec.codegen.backend import Backend, Refusal, Rule, Selection
from moec.codegen.destinations import ATTRIBUTE
from moec.codegen.fusion import FusionGroup, partition
from moec.codegen.host_sizes import with_host_sizes
from moec.codegen.index_ranges import moved_from
from moec.codegen.loops.index import Sizes, names
from moec.codegen.module_builder import Lowering, ModuleBuilder, Param
from moec.codegen.rules.sizes import bind_host_sizes
from moec.codegen.unsupported import check
from moec.errors import MoecError, UnsupportedError, first_line
from moec.ir.graph import Graph, Module, Op, TensorType, Value
from moec.ir.index_uses import REQUIRE, IndexUse, index_uses
from moec.ir.value_ranges import ValueRanges
from moec.runtime.package import DECODE, MAIN, WITH_CACHES, KernelCall, Stack, stored
from moec.target.base import Target

_KERNEL_CALL = tvm.ir.Op.get("relax.call_tir")

BUILDERS = threading.Lock()
"""Held while Relax is built: TVM keeps the open builders of all threads on one stack."""


@dataclass(frozen=True)
class LoweredModule:
    """The Relax modules of some programs, by the name of the target that they are for: one, or one
    for each part of a target (`Backend.parts`), which differ in kernels alone. A module has a
    function per program, whose arguments are the caller's inputs, the states, memory for results,
    then its weights: `params`, by the function's name. `destinations` are the outputs, by index,
    that have such memory. `kernels` pairs the origin of each op of the first program with its
    kernel; `refusals` are the reasons of ops without one. `stacks` are those of each layer in the
    functions that read experts from disk (`moec.runtime.package.stored`); without any, there are no
    such functions. `calls` are the calls of kernels by each function, in their order."""

    modules: Mapping[str, tvm.IRModule]
    params: Mapping[str, tuple[Param, ...]]
    kernels: tuple[tuple[str, str], ...]
    refusals: tuple[Refusal, ...] = ()
    destinations: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stacks: tuple[tuple[Stack, ...], ...] = ()
    calls: Mapping[str, tuple[KernelCall, ...]] = field(default_factory=dict)

    @property
    def module(self) -> tvm.IRModule:
        """The first module, which is the only one for a CPU."""
        return next(iter(self.modules.values()))


def lower(
    module: Module,
    target: Target,
    backend: Backend,
    *,
    store: bool = False,
) -> LoweredModule:
    """The Relax modules of `module`. `store` adds the functions that read experts from disk.

    Raises UnsupportedError that lists every op without a kernel and every unknown size.
    """
    parts = [_for_part(module, part, backend, store) for part in backend.parts(target)]
    assert all(_layout(part) == _layout(parts[0]) for part in parts), "parts share weights"
    return replace(parts[0], modules={n: m for part in parts for n, m in part.modules.items()})


def _layout(lowered: LoweredModule) -> list[tuple[str, TensorType]]:
    return [(p.name, p.type) for params in lowered.params.values() for p in params]


def _for_part(module: Module, target: Target, backend: Backend, store: bool) -> LoweredModule:
    with BUILDERS:
        # A kernel may not have the name of a function; `route` would be both.
        kernels = ModuleBuilder(
            relax.BlockBuilder(),
            backend.kernels,
            backend.loop,
            name_counts=Counter([*module, *map(stored, module)]),
        )
        params: dict[str, tuple[Param, ...]] = {}
        destinations: dict[str, tuple[int, ...]] = {}
        origins: tuple[tuple[str, str], ...] = ()
        refusals: dict[Refusal, None] = {}
        stacks: dict[str, tuple[tuple[Stack, ...], ...]] = {}
        calls: dict[str, Mapping[str, KernelCall]] = {}

        def add(name: str, function: str, slots: Any = None) -> None:
            nonlocal origins
            graph = module[name].graph
            if backend.index_checks:
                graph = with_index_checks(graph, module[name].weights)
            graph, host_sizes = with_host_sizes(graph)
            selection = backend.select(graph)
            refusals.update(dict.fromkeys(selection.refusals))
            in_memory = backend.destinations and name not in WITH_CACHES
            params[function], destinations[function], calls[function] = _function(
                function, graph, target, kernels, selection, host_sizes, in_memory, slots
            )
            origins = origins or tuple(kernels.sites)

        for name in module:
            add(name, name)
        if store and backend.slots is not None:
            for name in (name for name in (MAIN, DECODE) if name in module):
                slots = backend.slots()
                add(name, stored(name), slots)
                stacks[name] = slots.layers()
        finished = kernels.builder.finalize()
        return LoweredModule(
            {target.name: finished},
            params,
            origins,
            tuple(refusals),
            destinations,
            _same_stacks(stacks),
            _remaining(finished, calls),
        )


def _remaining(
    module: tvm.IRModule, calls: Mapping[str, Mapping[str, KernelCall]]
) -> dict[str, tuple[KernelCall, ...]]:
    """The calls by each function whose results are read: TVM leaves out the others."""
    module = relax.transform.DeadCodeElimination()(module)
    return {
        name: tuple(
            of_name[binding.var.name]
            for block in module[name].body.blocks
            for binding in block.bindings
            if binding.var.name in of_name
        )
        for name, of_name in calls.items()
    }


def _same_stacks(
    stacks: Mapping[str, tuple[tuple[Stack, ...], ...]],
) -> tuple[tuple[Stack, ...], ...]:
    """The stacks of all functions; none where functions read the same weights in other layouts,
    which would need slots for each."""
    names = [
        tuple(tuple(s.arrays for s in layer) for layer in layers) for layers in stacks.values()
    ]
    return next(iter(stacks.values()), ()) if len(set(names)) == 1 else ()


def supported(graph: Graph, backend: Backend) -> bool:
    """Whether every op and every size of the graph can be compiled."""
    return not unsupported(graph, backend)


def unsupported(graph: Graph, backend: Backend) -> str:
    """Why an op or a size of the graph cannot be compiled; empty if all can."""
    try:
        graph, host_sizes = with_host_sizes(graph)
        check(graph, backend.select(graph).rules.__contains__, host_sizes=host_sizes)
    except UnsupportedError as why:
        return str(why)
    return ""


def _emit(low: Lowering, group: FusionGroup, rule: Rule | None) -> Sequence[relax.Expr]:
    """The results of a group. What TVM or a rule raises by mistake names the op and its shapes."""
    root = group.root
    try:
        return low.group(group) if rule is None else rule.emit(low, root)
    except MoecError:
        raise
    except Exception as why:
        types = [", ".join(map(str, values)) for values in (root.inputs, root.outputs)]
        raise UnsupportedError(
            f"operator {root.name} at {root.origin or root.line or root.outputs[0].name}, "
            f"{types[0]} -> {types[1]}, has no kernel: {first_line(why)}, a defect of moec; run "
            "the part that contains it outside of the compiled module"
        ) from why


def _function(
    name: str,
    graph: Graph,
    target: Target,
    kernels: ModuleBuilder,
    selection: Selection,
    host_sizes: Mapping[str, sympy.Expr],
    in_memory: bool,
    slots: Any,
) -> tuple[tuple[Param, ...], tuple[int, ...], Mapping[str, KernelCall]]:
    """Adds the function of a graph; returns its params in order, the outputs, by index, that it
    writes into memory of the caller, which are none without `in_memory`, and its calls of kernels
    by the names of their results. `host_sizes` are the
    sizes that the runtime computes."""
    rules = selection.rules
    reasons = {op: refusal.reason for op, refusal in selection.refused.items()}
    check(graph, rules.__contains__, reasons, host_sizes)
    shaped = {name for v in graph.values() for name in names(*v.shape)}
    # A number read from data may be compared or multiplied without being the size of a tensor.
    read = {str(op.attrs["name"]) for op in graph.ops if op.name == "moec.size"}
    all_names = shaped | read | host_sizes.keys() | names(*host_sizes.values())
    sizes = Sizes({name: tirx.Var(name, "int64") for name in sorted(all_names)})
    low = Lowering(graph, target, kernels, sizes, rules, slots=slots)
    # The caller's inputs first, then the states in order.
    before = [state.before for state in graph.states]
    ordered = [*(v for v in graph.inputs if v not in before), *before]
    inputs = [relax.Var(v.name, low.type(v)) for v in ordered]
    low.values |= dict(zip(ordered, inputs, strict=True))
    builder = kernels.builder
    attributes: dict[str, Any] = {}
    with builder.function(name, attrs=attributes):
        with builder.dataflow():
            unbound = dict(host_sizes)
            bind_host_sizes(low, unbound, read)
            for group in partition(graph, rules.__contains__):
                if all(value in low.values for value in group.root.outputs):
                    continue  # emitted together with another op
                rule, low.root, low.noted = rules.get(group.root), group.root, []
                low.values |= dict(zip(group.root.outputs, _emit(low, group, rule), strict=True))
                if group.root.name == "moec.size":
                    read.discard(str(group.root.attrs["name"]))
                    bind_host_sizes(low, unbound, read)
            # Results of these functions are copied to the CPU.
            written = (
                _writable_outputs(low, ordered[: len(ordered) - len(before)]) if in_memory else ()
            )
            results = [builder.emit_output(low.value(v)) for v in graph.results]
        memory = [_memory(low, graph.outputs[index]) for index in written]
        if written:
            attributes[ATTRIBUTE] = [[n, len(inputs) + i] for i, n in enumerate(written)]
        params = [var for _, var in low.params.values()]
        builder.emit_func_output(relax.Tuple(results), [*inputs, *memory, *params])
    return tuple(param for param, _ in low.params.values()), written, _with_results(low)


def _with_results(low: Lowering) -> dict[str, KernelCall]:
    """The calls, each with the first value of the graph that each of its results is. A kernel has
    the memory of its results after its other arguments, or writes into the first argument."""
    names: dict[tuple[str, int], str] = {}
    for value, expression in low.values.items():
        base = low.bases.get(expression, expression)
        binding = low.builder.lookup_binding(base)
        if isinstance(binding, relax.TupleGetItem):
            names.setdefault((binding.tuple_value.name, binding.index), value.name)
        elif isinstance(binding, relax.Call):
            names.setdefault((base.name, 0), value.name)
    calls = dict(low.calls)
    for (result, index), value_name in names.items():
        if result in calls:
            binding = low.builder.lookup_binding(low.results[result])
            start = len(binding.args[1].fields) if binding.op == _KERNEL_CALL else 0
            results = (*calls[result].results, (start + index, value_name))
            calls[result] = replace(calls[result], results=results)
    return calls


def _memory(low: Lowering, output: Value) -> relax.Var:
    return relax.Var(f"{output.name}_memory", low.type(output))


def _writable_outputs(low: Lowering, inputs: Sequence[Value]) -> tuple[int, ...]:
    """The outputs, by index, that a kernel can write into memory of the caller: each has memory of
    its own, and a size that follows from those of the inputs."""
    graph = low.graph
    lengths = {str(size) for value in inputs for size in value.shape}
    values = [low.value(value) for value in graph.results]
    bases = [low.bases.get(value, value) for value in values]
    uses = Counter(bases)
    return tuple(
        index
        for index, (output, base) in enumerate(zip(graph.outputs, bases, strict=False))
        if uses[base] == 1
        and output.dtype != "c64"
        and names(*output.shape) <= lengths
        and _is_allocated(low, base)
    )


def _is_allocated(low: Lowering, value: relax.Expr) -> bool:
    """Whether a kernel call allocates the value, alone or with others."""
    call = low.builder.lookup_binding(value)
    if isinstance(call, relax.TupleGetItem):
        call = low.builder.lookup_binding(call.tuple_value)
    return isinstance(call, relax.Call) and call.op == _KERNEL_CALL


# Where a graph uses indices that may be outside of their axis, it requires that they are inside.
#
#     y = aten.gather(x, ids)   becomes   inside = moec.require_index(ids) <rows=4>
#                                         y = aten.gather(x, inside)
#
# Eager raises there; a kernel would use the nearest row. No check is needed for indices whose range
# follows from the op that makes them, as from a topk; for elements of an input, which the runtime
# looks at before the call (index_ranges.py); and for results of moec's ops.
def with_index_checks(graph: Graph, weights: Mapping[str, torch.Tensor]) -> Graph:
    """The graph with a check of all indices that need one. Checks that it has already, and that are
    not needed, are left out."""
    ranges = ValueRanges(graph, weights)
    inputs = frozenset(graph.inputs) - {state.before for state in graph.states}

    def trusted(use: IndexUse) -> bool:
        source = moved_from(graph, use.ids)
        producer = graph.producers.get(source)
        if producer is None:
            return source in inputs or ranges.inside(use)
        of_moec = not producer.name.startswith("aten.") and producer.name != REQUIRE
        return of_moec or ranges.inside(use)

    names = {value.name for value in graph.values()}
    ops: list[Op] = []
    replaced: dict[Value, Value] = {}
    checked: dict[IndexUse, Value] = {}
    for op in graph.ops:
        if op.name == REQUIRE:
            (use,) = index_uses(op)
            if trusted(use):
                replaced[op.outputs[0]] = replaced.get(op.inputs[0], op.inputs[0])
                continue
        needed = {use.ids: use for use in index_uses(op) if op.name != REQUIRE and not trusted(use)}
        inside = dict(replaced)
        for ids, use in needed.items():
            if use not in checked:
                check = _check(op, use, replaced.get(ids, ids), names)
                ops.append(check)
                checked[use] = check.outputs[0]
            inside[ids] = checked[use]
        changed = any(value in inside for value in op.inputs)
        values = tuple(inside.get(value, value) for value in op.inputs)
        ops.append(replace(op, inputs=values) if changed else op)
    if not checked and not replaced:
        return graph
    outputs = tuple(replaced.get(value, value) for value in graph.outputs)
    states = tuple(
        replace(state, after=replaced.get(state.after, state.after)) for state in graph.states
    )
    return replace(graph, ops=tuple(ops), outputs=outputs, states=states)


def _check(op: Op, use: IndexUse, ids: Value, names: set[str]) -> Op:
    stem = f"{ids.name}_inside"
    name, count = stem, 1
    while name in names:
        count += 1
        name = f"{stem}_{count}"
    names.add(name)
    attrs = {"rows": use.size, "negative": use.negative, "what": description(op)}
    return Op(REQUIRE, (ids,), (Value(name, ids.type),), attrs, None, op.origin, op.line)


def description(op: Op) -> str:
    """An op that uses indices, for messages: with the user's line where it is known."""
    name = op.name.removeprefix("aten.").split(".")[0]
    where = op.line or op.origin
    return f"{name} ({where})" if where else name
