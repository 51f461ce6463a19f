"""Program -> Package: the library, and the weights as its kernels want them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from types import MappingProxyType

import ml_dtypes
import numpy as np
import torch

from moec.codegen.build import compile_module
from moec.codegen.cpu.tuning import Tuning
from moec.codegen.generic.rules import EMIT, named
from moec.codegen.link import linked
from moec.codegen.lower import Lowered, lower
from moec.codegen.lowering import Param
from moec.ir import Graph, Program, Value
from moec.passes.hoist_routers import Hoisted
from moec.runtime.dtypes import Array
from moec.runtime.package import (
    Chosen,
    CpuNeeds,
    Package,
    Port,
    Routers,
    Size,
    StatePort,
    Step,
)
from moec.target import Target

__all__ = ["build"]


def build(
    program: Program,
    target: Target,
    opt_level: int = 2,
    step: Program | None = None,
    hoisted: Hoisted | None = None,
    tunings: Mapping[str, Tuning] = MappingProxyType({}),
) -> Package:
    """Compile a program of any stage that `lower` takes for a CPU, with the same for tokens that
    come in pieces (`moec.passes.incremental`), where they can, and with its routers by themselves
    (`moec.passes.hoist_routers`), where they were hoisted.

    Arrays that no kernel wants packed share the memory of the program's weights. `opt_level` 0
    leaves LLVM's optimisation out. `tunings` are the values of kernels, by their key.

    Raises UnsupportedError (everything that has no kernel at once) and TargetError (no linker).
    """
    lowered = lowered_for(program, target, step, hoisted, tunings)
    library = linked(compile_module(lowered.module, target, opt_level), target)
    made = package(program, target, lowered, library, step)
    names = {kernel.key: kernel.values for kernel in lowered.tunable}
    made = replace(made, tunings={key: t.values(names[key]) for key, t in tunings.items()})
    return made if hoisted is None else _with_routers(made, lowered, hoisted)


def lowered_for(
    program: Program,
    target: Target,
    step: Program | None = None,
    hoisted: Hoisted | None = None,
    tunings: Mapping[str, Tuning] = MappingProxyType({}),
) -> Lowered:
    """The module of what `build` takes, before it is compiled."""
    routers = None if hoisted is None else (hoisted.route.graph, hoisted.routed.graph)
    return lower(program.graph, target, None if step is None else step.graph, routers, tunings)


def package(
    program: Program,
    target: Target,
    lowered: Lowered,
    library: bytes,
    step: Program | None = None,
    *,
    weights: bool = True,
) -> Package:
    """What `build` gives, for a module that was lowered and compiled before.

    `weights=False` leaves the arrays to be bound later (`Executor.bind`).
    """
    graph = program.graph
    before = [state.before for state in graph.states]
    arrays = packed_arrays(lowered.params, program.weights) if weights else {}
    if step is not None:
        more = tuple(param for param in lowered.step if param.name not in arrays)
        arrays |= packed_arrays(more, step.weights)
    states = []
    for value in before:
        initial = f"{value.name}.initial" if value.name in program.weights else ""
        if initial:
            arrays[initial] = as_array(program.weights[value.name])
        states.append(StatePort(value.name, value.dtype, _shape(value), initial))
    return Package(
        target=CpuNeeds(target.name, target.mcpu, target.mattr, target.mtriple, target.features),
        inputs=tuple(_port(v) for v in graph.inputs if v not in before),
        outputs=tuple(_port(v) for v in graph.outputs),
        states=tuple(states),
        sizes={name: (b.low, b.high) for name, b in graph.bounds.items()},
        params=ports(lowered.params),
        arrays=arrays,
        library=library,
        index_ranges=index_ranges(graph),
        kernels=lowered.kernels,
        notes=tuple(_notes(lowered.params)),
        versions={
            "moec": version("moec"),
            "tvm": version("apache-tvm"),
            "torch": torch.__version__,
        },
        step=None if step is None else _step(step.graph, lowered),
    )


def _with_routers(made: Package, lowered: Lowered, hoisted: Hoisted) -> Package:
    more = (*lowered.route, *lowered.routed)
    known = {**hoisted.routed.weights, **hoisted.route.weights}
    arrays = packed_arrays(tuple(p for p in more if p.name not in made.arrays), known)
    route = hoisted.route.graph
    return replace(
        made,
        arrays={**made.arrays, **arrays},
        routers=Routers(
            tuple(map(_port, route.inputs)),
            tuple(map(_port, route.outputs)),
            tuple(
                Chosen(c.layer, c.experts.name, c.weights.name if c.weights else "")
                for c in hoisted.choices
            ),
            ports(lowered.route),
            ports(lowered.routed),
        ),
    )


def ports(params: tuple[Param, ...]) -> tuple[Port, ...]:
    return tuple(Port(p.name, p.type.dtype, tuple(_size(d) for d in p.type.shape)) for p in params)


def _step(graph: Graph, lowered: Lowered) -> Step:
    tokens, (logits,) = graph.inputs[0], graph.outputs
    sequence = str(tokens.shape[1])
    ids = index_ranges(graph).get(tokens.name)
    vocabulary = logits.shape[-1] if ids is None else ids[1] + 1
    assert isinstance(vocabulary, int)
    longest = graph.bounds[sequence].high if sequence in graph.bounds else None
    caches = tuple(_port(state.before) for state in graph.states)
    return Step(caches, _port(logits), ports(lowered.step), vocabulary, longest)


def _port(value: Value) -> Port:
    return Port(value.name, value.dtype, _shape(value))


def _shape(value: Value) -> tuple[Size, ...]:
    return tuple(_size(d) for d in value.shape)


def _size(dim: object) -> Size:
    return dim if isinstance(dim, int) else str(dim)


# ---- weights ---------------------------------------------------------------------------


def packed_arrays(
    params: tuple[Param, ...], weights: Mapping[str, torch.Tensor]
) -> dict[str, Array]:
    """The arrays of a package: weights by name, as the kernels want them."""
    arrays = {}
    for param in params:
        tensors = [weights[value.name].detach() for value in param.values]
        made = as_array(tensors[0]) if param.pack is None else param.pack(*tensors)
        arrays[param.name] = made
    return arrays


def as_array(tensor: torch.Tensor) -> Array:
    """The same memory as a numpy array, where the tensor is contiguous."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return np.asarray(tensor.resolve_conj().numpy())


def _notes(params: tuple[Param, ...]) -> Iterator[str]:
    """Weights that two kernels read in two layouts take their memory twice."""
    forms: dict[Value, list[str]] = {}
    for param in params:
        for value in param.values:
            forms.setdefault(value, []).append(param.name)
    for value, names in forms.items():
        if len(names) > 1:
            yield f"weight {value.name} is stored {len(names)} times: {', '.join(names)}"


# ---- inputs that look up rows ----------------------------------------------------------

_LOOKUPS = {
    "aten.embedding.default": ("indices", "weight"),
    "aten.index_select.default": ("index", "self"),
}


def index_ranges(graph: Graph) -> dict[str, tuple[int, int]]:
    """The values that an integer input may hold because it looks up rows of a table.

    Followed through ops that only move or copy elements.
    """
    found: dict[str, tuple[int, int]] = {}
    for value in graph.inputs:
        if value.dtype not in ("i64", "i32"):
            continue
        waiting, seen = [value], {value}
        while waiting:
            for op in graph.readers.get(waiting.pop(), ()):
                if op.name in _LOOKUPS:
                    ids, table = (named(op)[name] for name in _LOOKUPS[op.name])
                    rows = table.shape[0] if op.name == "aten.embedding.default" else None
                    if ids in seen and isinstance(rows, int):
                        _, high = found.get(value.name, (0, rows - 1))
                        found[value.name] = (0, min(high, rows - 1))
                    continue
                rule = EMIT.get(op.name)
                moves = rule is not None and rule.point is not None and rule.cost == 0
                if moves and len(op.inputs) == 1 and op.outputs[0] not in seen:
                    seen.update(op.outputs)
                    waiting += op.outputs
    return found
