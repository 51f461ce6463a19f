"""A GPU as the device of a model whose experts are copied to it, within a limit of its memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moec.errors import InputError
from moec.runtime.artifact.mapped_arrays import CheckedArrays, MappedArrays
from moec.runtime.checks import show_bytes
from moec.runtime.device.cudart import cuda
from moec.runtime.device.gpu import GpuDevice, allocated
from moec.runtime.device.tensors import from_numpy
from moec.runtime.dtypes import NUMPY
from moec.runtime.expert_store.device import MAPPED, PINNED, StoreReport, sizes_of
from moec.runtime.expert_store.gpu_native import CopiedArray, CopiedLayer, GpuStore, pinned
from moec.runtime.expert_store.native import StoreOptions
from moec.runtime.package import Package, Stack, stored


@dataclass(frozen=True)
class GpuSlotArrays(CheckedArrays):
    """The arrays of a model: the slots of `experts` and the keys of stacks are tensors already, and
    the others are `mapped`."""

    mapped: MappedArrays
    experts: HostExperts

    def check_unchanged(self) -> object:
        return self.mapped.check_unchanged()

    def __getitem__(self, name: str) -> Any:
        tensors = self.experts.tensors
        return tensors[name] if name in tensors else self.mapped[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.mapped.stored, **self.experts.tensors})

    def __len__(self) -> int:
        return len({**self.mapped.stored, **self.experts.tensors})


class HostExperts:
    """The experts of a model in memory of the host, and their slots on a GPU: `tensors` are the
    slots, and the keys of stacks, by name, once they are open."""

    def __init__(
        self,
        package: Package,
        arrays: MappedArrays,
        slots: Sequence[int],
        options: StoreOptions | None,
    ) -> None:
        assert package.store is not None
        self._layers, self._slots = package.store.layers, tuple(slots)
        self._arrays, self._sizes = arrays, sizes_of(package, arrays)
        self._options = options or StoreOptions()
        self.tensors: dict[str, Any] = {}
        self.reading, self._pinned = PINNED, list[int]()

    @property
    def slot_bytes(self) -> int:
        return sum(n * x.expert_bytes for n, x in zip(self._slots, self._sizes, strict=True))

    def open(self, library: Any, gpu: GpuDevice) -> None:
        """Raises TargetError where the slots do not fit, RuntimeError where CUDA refuses."""
        gpu.reserve(self.slot_bytes)
        cuda("cudaSetDevice", gpu.index)
        layers = [
            CopiedLayer(
                size.experts, slots, tuple(self._product(stack, slots, gpu) for stack in stacks)
            )
            for stacks, slots, size in zip(self._layers, self._slots, self._sizes, strict=True)
        ]
        function, index, memory = library.get_function, gpu.index, (self.tensors, self._arrays)
        self._store = GpuStore(function, layers, self._options, index, self._pinned, memory)
        keys = [stack.key for layer in self._layers for stack in layer]
        for number, key in enumerate(keys):
            self.tensors[key] = from_numpy(np.array([self._store.address, number], np.int64))

    def _product(self, stack: Stack, slots: int, gpu: GpuDevice) -> tuple[CopiedArray, ...]:
        return tuple(self._copied(name, slots, gpu) for name in stack.arrays)

    def _copied(self, name: str, slots: int, gpu: GpuDevice) -> CopiedArray:
        array = self._arrays[name]
        shape, dtype = (slots, *array.shape[1:]), NUMPY[self._arrays.stored[name].dtype].name
        tensor = self.tensors[name] = allocated(shape, dtype, gpu.memory, gpu.index)
        address = array.ctypes.data
        if self.reading == PINNED:
            try:
                address = pinned(array.nbytes)
            except RuntimeError:
                self.reading = MAPPED  # and CUDA copies from the file's pages through its own
            else:
                self._pinned.append(address)
                ctypes.memmove(address, array.ctypes.data, array.nbytes)
        return CopiedArray(tensor.data_ptr(), address, array.nbytes // len(array))

    def report(self) -> StoreReport:
        return StoreReport(
            tuple(layer[0].layer for layer in self._layers),
            self._slots,
            tuple(size.experts for size in self._sizes),
            self.slot_bytes,
            sum(size.experts * size.expert_bytes for size in self._sizes),
            self.reading,
            self._store.counts(),
        )


@dataclass(frozen=True)
class StoringGpu(GpuDevice):
    """A GPU to which functions copy experts. `caches`: the most bytes of caches of texts."""

    experts: HostExperts | None = None
    caches: int | None = None

    def functions(self, package: Package) -> Mapping[str, Any]:
        assert self.experts is not None
        experts = self.experts
        opened = self.opened(
            package, map(stored, package.functions), lambda library: experts.open(library, self)
        )
        return {name: opened[stored(name)] for name in package.functions}

    def check_caches(self, size: int) -> None:
        """Raises InputError where texts need more than the limit of memory leaves them."""
        if self.caches is not None and size > self.caches:
            raise InputError(
                f"the caches of the texts take {show_bytes(size)}, and the limit of memory has "
                f"room for {show_bytes(self.caches)} of them: give fewer or shorter texts at once"
            )

    def report(self) -> StoreReport:
        assert self.experts is not None
        return self.experts.report()
