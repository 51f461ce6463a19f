"""The expert store of a library for GPUs, codegen/cuda/expert_store.c: its structs, its streams."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from moec.errors import ArtifactError
from moec.runtime.device.cudart import CUDART, cuda
from moec.runtime.device.library import tvm_ffi
from moec.runtime.expert_store.native import StackInSlots, StoreCounts, StoreOptions, options_of
from moec.runtime.process.pool import address

OPEN, CLOSE = "moec_device_store_open", "moec_device_store_close"
COUNTS = "moec_device_store_counts"
_NO_WAIT_FOR_OTHERS = 1  # cudaStreamNonBlocking: the default stream does not wait for it
_NO_TIMES = 2  # cudaEventDisableTiming


@dataclass(frozen=True)
class CopiedArray:
    """An array of a stack: the addresses of its slots on the GPU and of its experts on the host."""

    slots: int
    experts: int
    expert_bytes: int


@dataclass(frozen=True)
class CopiedLayer:
    """`products`: the arrays of each stack."""

    experts: int
    slots: int
    products: tuple[tuple[CopiedArray, ...], ...]


class NativeArray(ctypes.Structure):
    """`Array` of the store."""

    _fields_ = (
        ("slots", ctypes.c_void_p),
        ("experts", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
    )


class NativeProduct(ctypes.Structure):
    """`Product` of the store."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in "layer number arrays products".split()),
        ("array", ctypes.POINTER(NativeArray)),
    )


_RUNTIME = (
    "cudaSetDevice",
    "cudaMemcpyAsync",
    "cudaStreamSynchronize",
    "cudaStreamWaitEvent",
    "cudaEventRecord",
    "cudaGetErrorString",
)


class NativeOptions(ctypes.Structure):
    """`DeviceOptions` of the store."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_RUNTIME, "stream_of")),
        ("policy", ctypes.c_void_p),
        ("product", ctypes.POINTER(NativeProduct)),
        *((name, ctypes.c_void_p) for name in ("table", "ends", "stream", "read")),
        ("filled", ctypes.POINTER(ctypes.c_void_p)),
        *((name, ctypes.c_int32) for name in ("device", "most")),
    )


def pinned(size: int) -> int:
    """The address of so many bytes of page-locked memory, from which copies run beside kernels.
    Raises RuntimeError where the system does not give so much."""
    memory = ctypes.c_void_p()
    try:
        cuda("cudaMallocHost", ctypes.byref(memory), ctypes.c_size_t(size))
    except RuntimeError:
        ctypes.CDLL(CUDART).cudaGetLastError()  # which forgets it
        raise
    assert memory.value is not None
    return memory.value


class GpuStore:
    """An open store of a library, whose functions `function` returns by name. `pinned_memory` is
    freed with the store, and `memory` stays until then."""

    def __init__(
        self,
        function: Callable[[str], Any],
        layers: Sequence[CopiedLayer],
        options: StoreOptions,
        index: int,
        pinned_memory: list[int],
        memory: Any,
    ) -> None:
        """Raises RuntimeError where CUDA refuses, ArtifactError where there is no memory."""
        most, products = max(x.experts for x in layers), max(len(x.products) for x in layers)
        self._stream, self._memory = ctypes.c_void_p(), memory
        cuda("cudaStreamCreateWithFlags", ctypes.byref(self._stream), _NO_WAIT_FOR_OTHERS)
        events = (ctypes.c_void_p * (1 + most * products))()
        size = ctypes.sizeof(ctypes.c_void_p)
        for number in range(len(events)):
            cuda("cudaEventCreateWithFlags", ctypes.byref(events, number * size), _NO_TIMES)
        table, ends = pinned(8 * sum(layer.experts for layer in layers)), pinned(4 * most)
        stacks = [StackInSlots(n, n, 1, x.experts, x.slots, ()) for n, x in enumerate(layers)]
        policy = options_of(stacks, options)
        listed = [
            NativeProduct(layer, number, len(arrays), len(of.products), _arrays(arrays))
            for layer, of in enumerate(layers)
            for number, arrays in enumerate(of.products)
        ]
        opened = NativeOptions(
            *map(address, _functions()),
            ctypes.addressof(policy),
            (NativeProduct * len(listed))(*listed),
            table,
            ends,
            self._stream,
            events[0],
            ctypes.cast(ctypes.byref(events, size), ctypes.POINTER(ctypes.c_void_p)),
            index,
            most,
        )
        self.address: int = function(OPEN)(ctypes.addressof(opened))
        if not self.address:
            raise ArtifactError("the system gives the store of experts no memory")
        self._read_counts, self._total = function(COUNTS), StoreCounts()
        native = (opened, policy, events, listed)  # which the store points to
        close, blocks = function(CLOSE), [*pinned_memory, table, ends]
        weakref.finalize(self, _close, close, self.address, self._stream, blocks, events, native)

    def counts(self) -> StoreCounts:
        """Since the store was opened; without times."""
        raw = (ctypes.c_int64 * 6)()
        self._read_counts(self.address, ctypes.addressof(raw))
        self._total += StoreCounts(*raw[:4])
        return self._total


def _functions() -> list[Any]:
    """Of the CUDA runtime and of tvm_ffi."""
    runtime, ffi = ctypes.CDLL(CUDART), ctypes.CDLL(tvm_ffi().libinfo.find_libtvm_ffi())
    return [*(getattr(runtime, name) for name in _RUNTIME), ffi.TVMFFIEnvGetStream]


def _arrays(arrays: Sequence[CopiedArray]) -> Any:
    return (NativeArray * len(arrays))(
        *(NativeArray(a.slots, a.experts, a.expert_bytes) for a in arrays)
    )


def _close(
    close: Any, store: int, stream: Any, blocks: list[int], events: Any, native: Any
) -> None:
    """Copies use the memory until they have ended."""
    with suppress(RuntimeError):  # of a GPU that has failed
        cuda("cudaStreamSynchronize", stream)
        for block in blocks:
            cuda("cudaFreeHost", ctypes.c_void_p(block))
        for event in events:
            cuda("cudaEventDestroy", ctypes.c_void_p(event))
        cuda("cudaStreamDestroy", stream)
    close(store)
