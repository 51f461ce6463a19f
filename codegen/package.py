"""Program -> Package: the library, and the weights in the layouts of its kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version

import ml_dtypes
import numpy as np
import torch

from moec.codegen.backend import Backend
from moec.codegen.backends import backend_for
from moec.codegen.index_ranges import index_ranges
from moec.codegen.lower import LoweredModule, lower
from moec.codegen.module_builder import Param, as_array
from moec.errors import VerificationError
from moec.ir.graph import Module, Program, Value
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
from moec.sources.memory.memory import InMemory
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
        check_arrays(params, module[name].weights, packed, memory or InMemory())
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


def check_arrays(
    params: Sequence[Param],
    weights: Mapping[str, torch.Tensor],
    arrays: Mapping[str, Array],
    memory: InMemory,
) -> None:
    """Compare what the arrays hold with the weights, bit for bit. Raises VerificationError."""
    for param in params:
        tensors = [weights[value.name].detach() for value in (*param.values, *param.beside)]
        memory.fill(tensors)
        array = _as_tensor(arrays[param.name])
        if param.unpack is not None:
            parts = param.unpack(array, *tensors)
        else:
            right = _as_tensor(param.pack()) if param.pack is not None else tensors[0]
            parts = zip(*(torch.split(t.reshape(-1), _PART) for t in (array, right)), strict=True)
        if not all(_same_bits(held, right) for held, right in parts):
            raise VerificationError(
                f"the weight {param.name} is stored with other bits than the model's: report it"
            )


_PART = 1 << 22
"""Elements that are compared at a time."""


def _as_tensor(array: Array) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    same_type = a.shape == b.shape and a.dtype == b.dtype
    if same_type and a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    flat = (t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8) for t in (a, b))
    return same_type and torch.equal(*flat)


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
