"""Program -> Package: the library, and the weights in the layouts of its kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version

import numpy as np
import torch

from moec.codegen.backend import Backend
from moec.codegen.backends import backend_for
from moec.codegen.index_ranges import index_ranges
from moec.codegen.lower import LoweredModule, lower
from moec.codegen.module_builder import Param, as_array, has_nan
from moec.dtypes import FLOATS
from moec.errors import VerificationError
from moec.ir.aten import TORCH_DTYPES
from moec.ir.graph import Module, Program, Value
from moec.memory.memory import InMemory
from moec.runtime.dtypes import Array
from moec.runtime.package import (
    DECODE,
    MAIN,
    WITH_CACHES,
    BuiltLibrary,
    Function,
    Generation,
    Package,
    Port,
    Size,
    StatePort,
    StoredExperts,
    stored,
)
from moec.target.base import Target

__all__ = ["build"]


def build(
    module: Module,
    target: Target,
    opt_level: int = 2,
    backend: Backend | None = None,
    memory: InMemory | None = None,
    store: bool = False,
) -> Package:
    """Compiles programs of any stage that `lower` takes, each as a function of the library;
    `moec.runtime.package` documents the functions' names. `backend` defaults to that of the
    target's kind.

    Arrays that no kernel packs share the memory of the program's weights, unless that is bounded;
    `memory` is where the weights are, and the arrays. `opt_level` 0 disables LLVM's optimisation.
    `store` adds functions that read experts from disk.

    Raises UnsupportedError (for everything without a kernel at once) and TargetError (no linker).
    """
    backend = backend or backend_for(target)
    lowered = lower(module, target, backend, store=store)
    library = backend.library(lowered.modules, target, opt_level, None)
    return package(module, target, lowered, library, memory=memory)


def package(
    module: Module,
    target: Target,
    lowered: LoweredModule,
    library: BuiltLibrary,
    *,
    weights: bool = True,
    memory: InMemory | None = None,
) -> Package:
    """The result of `build`, for programs that are already lowered and compiled.

    `weights=False` leaves the arrays to be bound later (`Executor.bind`).
    """
    functions = {
        name: signature(
            name, module[name], ports(lowered.params[name]), lowered.destinations.get(name, ())
        )
        for name in module
    }
    arrays: dict[str, Array] = {}
    for name in module if weights else ():
        params = tuple(param for param in lowered.params[name] if param.name not in arrays)
        packed = packed_arrays(params, module[name].weights, memory or InMemory())
        check_numbers(params, module[name].weights, packed, memory or InMemory())
        arrays |= packed
    for state in (state for function in functions.values() for state in function.states):
        if state.initial:
            arrays[state.initial] = as_array(module.main.weights[state.name])
    return Package(
        target=target.needs,
        functions=functions,
        arrays=arrays,
        library=library.host,
        gpu=library.gpu,
        kernels=lowered.kernels,
        refusals=tuple((r.origin, r.op, r.reason) for r in lowered.refusals),
        notes=tuple(_notes(lowered.params[MAIN])),
        versions={
            "moec": version("moec"),
            "tvm": version("apache-tvm"),
            "torch": str(torch.__version__),
        },
        generation=generation_of(functions[DECODE]) if DECODE in functions else None,
        calls={} if library.gpu else lowered.calls,
        store=stored_experts(module, lowered),
    )


def stored_experts(module: Module, lowered: LoweredModule) -> StoredExperts | None:
    """The functions that read experts from disk; None without any."""
    functions = {
        name: signature(
            name,
            module[name],
            ports(lowered.params[stored(name)]),
            lowered.destinations[stored(name)],
        )
        for name in module
        if stored(name) in lowered.params
    }
    return StoredExperts(functions, lowered.stacks) if lowered.stacks else None


def ports(params: tuple[Param, ...]) -> tuple[Port, ...]:
    return tuple(Port(p.name, p.type.dtype, tuple(_size(d) for d in p.type.shape)) for p in params)


def signature(
    name: str, program: Program, params: tuple[Port, ...], destinations: Sequence[int] = ()
) -> Function:
    """The inputs and outputs of the library's function `name`, from its graph. `destinations` are
    the outputs, by index, that it writes into memory of the caller."""
    graph = program.graph
    held = [state.before for state in graph.states]
    caches = [value for value in held if name in WITH_CACHES or not _is_fixed(value)]
    states = tuple(_state(value, program.weights) for value in held if value not in caches)
    return Function(
        inputs=tuple(port(v) for v in graph.inputs if v not in held),
        outputs=tuple(map(port, graph.outputs)),
        params=params,
        destinations=tuple(graph.outputs[index].name for index in destinations),
        states=states,
        caches=tuple(map(port, caches)),
        sizes={name: (b.low, b.high) for name, b in graph.bounds.items()},
        index_ranges=index_ranges(graph),
        causes={name: b.line for name, b in graph.bounds.items() if b.line},
    )


def _is_fixed(value: Value) -> bool:
    """Whether every size is a number: the sizes of other states are known only to the caller."""
    return all(isinstance(dim, int) for dim in value.shape)


def _state(value: Value, weights: Mapping[str, torch.Tensor]) -> StatePort:
    initial = f"{value.name}.initial" if value.name in weights else ""
    return StatePort(value.name, value.dtype, _shape(value), initial)


def generation_of(decode: Function) -> Generation:
    """What the signature of `decode` says about texts; it has no end-of-text tokens."""
    tokens, (logits,) = decode.inputs[0], decode.outputs
    _, last = decode.index_ranges.get(tokens.name, (0, ""))
    vocabulary = last + 1 if isinstance(last, int) else logits.shape[-1]
    assert isinstance(vocabulary, int)
    _, longest = decode.sizes.get(str(tokens.shape[1]), (0, None))
    return Generation(vocabulary, longest)


def port(value: Value) -> Port:
    """A value as a tensor that is passed into or out of a function."""
    return Port(value.name, value.dtype, _shape(value))


def _shape(value: Value) -> tuple[Size, ...]:
    return tuple(_size(d) for d in value.shape)


def _size(dim: object) -> Size:
    return dim if isinstance(dim, int) else str(dim)


# ---- weights ---------------------------------------------------------------------------


def check_numbers(
    params: tuple[Param, ...],
    weights: Mapping[str, torch.Tensor],
    arrays: Mapping[str, Array],
    memory: InMemory,
) -> None:
    """Raises VerificationError where an array holds NaN, and the weights in it do not."""
    for param in params:
        dtypes = {param.type.dtype} & {*FLOATS} or {value.dtype for value in param.values}
        if len(dtypes) != 1 or not dtypes <= {*FLOATS} or param.beside:  # codes that mean NaN
            continue
        content = np.ascontiguousarray(arrays[param.name]).reshape(-1).view(np.uint8)
        if has_nan(torch.from_numpy(content).view(TORCH_DTYPES[min(dtypes)])):
            tensors = [weights[value.name] for value in param.values]
            memory.fill(tensors)
            if not any(map(has_nan, tensors)):
                raise VerificationError(
                    f"the weight {param.name} would be stored with NaN, and the model's has none: "
                    "report it"
                )


def packed_arrays(
    params: tuple[Param, ...], weights: Mapping[str, torch.Tensor], memory: InMemory
) -> dict[str, Array]:
    """The arrays of a package: weights by name, in the layouts of the kernels."""
    arrays = {}
    for param in params:
        values = (*param.values, *param.beside)
        tensors = [weights[value.name].detach() for value in values]
        memory.fill(tensors)
        array = as_array(tensors[0]) if param.pack is None else param.pack(*tensors)
        arrays[param.name] = memory.array(array)
    return arrays


def _notes(params: tuple[Param, ...]) -> Iterator[str]:
    """Notes on weights that two kernels read in two layouts, and that are therefore stored
    twice."""
    forms: dict[Value, list[str]] = {}
    for param in params:
        for value in param.values:
            forms.setdefault(value, []).append(param.name)
    for value, names in forms.items():
        if len(names) > 1:
            yield f"weight {value.name} is stored {len(names)} times: {', '.join(names)}"
