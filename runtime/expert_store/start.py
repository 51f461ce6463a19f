"""Starts a model whose experts stay in the artifact's file, within a limit of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moec.errors import SetupError, UsageError
from moec.runtime.artifact.artifact import Artifact
from moec.runtime.artifact.mapped_arrays import MappedArrays
from moec.runtime.artifact.open_file import OpenFile
from moec.runtime.call.caches import bytes_of_caches
from moec.runtime.call.executor import Executor, start
from moec.runtime.checks import free_memory
from moec.runtime.device.library import tvm_ffi
from moec.runtime.expert_store.device import (
    BUFFERED,
    DIRECT,
    SlotArrays,
    StoreReport,
    StoringCpu,
    sizes_of,
)
from moec.runtime.expert_store.native import StoreOptions, hash_function
from moec.runtime.expert_store.slots import LayerSize, MemoryLimit, slots_within
from moec.runtime.package import DECODE, Package
from moec.runtime.process.memory_limit import resident_bytes

Fit = Callable[[MemoryLimit, Sequence[LayerSize]], tuple[Sequence[int], StoreOptions | None]]
"""(limit, layers) -> the slots of each layer, and options of the store (None: the default)."""


def fit_evenly(limit: MemoryLimit, layers: Sequence[LayerSize]) -> tuple[Sequence[int], None]:
    return slots_within(limit, layers), None


@dataclass(frozen=True)
class TextRoom:
    """The texts that caches are for, and the most tokens of each."""

    texts: int = 1
    tokens: int = 4096


ONE_TEXT = TextRoom()


def start_within(
    opened: Artifact, limit: int, fit: Fit = fit_evenly, room: TextRoom = ONE_TEXT
) -> Executor:
    """The model, in at most `limit` bytes of memory, with the caches of some texts. Where all of it
    fits, no store is needed.

    Raises UsageError where the limit is too small, the model is on a GPU, or was compiled without a
    store, and ArtifactError as `runtime.call.executor.start` does.
    """
    if opened.package.gpu is not None:
        raise UsageError("--memory limits a model on a CPU, and this one is on a GPU: leave it out")
    total, caches = _weight_bytes(opened), _cache_bytes(opened.package, room)
    if MemoryLimit(limit, _process_bytes(), total, caches).experts >= 0:
        return start(opened)
    sizes = stored_sizes(opened)
    slots, options = fit(resident_limit(opened, limit, room), sizes)
    return start_with_slots(opened, slots, options=options, caches=caches)


def stored_sizes(opened: Artifact) -> list[LayerSize]:
    """The layers of a model's store. Raises UsageError where it was compiled without one."""
    if opened.package.store is None:
        raise SetupError(
            f"{opened.path} takes {_weight_bytes(opened):,} bytes and was compiled without a store "
            "of experts: compile it with store=True (--store), which needs experts of one format "
            "for each product, or load it without a limit of memory"
        )
    return sizes_of(opened.package, _arrays(opened))


def resident_limit(opened: Artifact, limit: int, room: TextRoom) -> MemoryLimit:
    """What is left for experts of a limit, where this process holds the model."""
    experts = sum(layer.experts * layer.expert_bytes for layer in stored_sizes(opened))
    resident, caches = _weight_bytes(opened) - experts, _cache_bytes(opened.package, room)
    return MemoryLimit(limit, _process_bytes(), resident, caches)


def expert_file(opened: Artifact) -> OpenFile:
    """The file that has the experts of a model with a store."""
    assert opened.package.store is not None
    return _arrays(opened).file_part(opened.package.store.layers[0][0].arrays[0]).file


def _weight_bytes(opened: Artifact) -> int:
    return sum(array.nbytes for array in _arrays(opened).stored.values())


def start_with_slots(
    opened: Artifact,
    slots: Sequence[int],
    reading: str | None = None,
    options: StoreOptions | None = None,
    caches: int | None = None,
) -> Executor:
    """The model with this number of slots for each layer of the store. `reading` is `direct`,
    `buffered`, or the one that suits the free memory. `caches` limits the bytes of caches."""
    package, arrays = opened.package, _arrays(opened)
    assert package.store is not None
    names = {name for layer in package.store.layers for s in layer for name in s.arrays}
    experts = arrays.streaming(names, verified=hash_function() is not None)
    experts.verify()
    size = sum(arrays.stored[name].nbytes for name in names)
    reading = reading or (BUFFERED if 2 * size < free_memory() else DIRECT)
    device = StoringCpu(opened, experts, tuple(slots), reading, options, caches)
    functions = package.store.functions
    held = replace(
        package,
        functions=functions,
        arrays=SlotArrays(experts, device.in_memory, device),
        generation=package.generation if DECODE in functions else None,
        routers=(),
        recorded=(),
    )
    return Executor(held, device=device)


def _cache_bytes(package: Package, room: TextRoom) -> int:
    """Those of the caches of texts, none longer than the model takes."""
    if package.generation is None:
        return 0
    longest = package.generation.longest or room.tokens
    ports = package.functions[DECODE].caches
    return bytes_of_caches(ports, room.texts, min(longest, room.tokens))


def store_report(executor: Executor) -> StoreReport | None:
    """None where all experts are in memory."""
    device = executor.device
    return device.report() if isinstance(device, StoringCpu) else None


def _arrays(opened: Artifact) -> MappedArrays:
    arrays = opened.package.arrays
    if not isinstance(arrays, MappedArrays):
        raise UsageError("a model with a limit of memory is read from its file: leave copy out")
    return arrays


def _process_bytes() -> int:
    """What the process holds in memory now."""
    tvm_ffi()  # a part of it
    return resident_bytes()
