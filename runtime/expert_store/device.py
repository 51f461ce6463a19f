"""The CPU as the device of a model whose experts are read from disk, and its arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moec.errors import ArtifactError, InputError, MoecError
from moec.runtime.artifact.artifact import Artifact
from moec.runtime.artifact.mapped_arrays import CheckedArrays, MappedArrays
from moec.runtime.artifact.open_file import OpenFile
from moec.runtime.checks import show_bytes
from moec.runtime.device.device import Cpu
from moec.runtime.device.library import open_library
from moec.runtime.dtypes import NUMPY, Array
from moec.runtime.expert_store.native import (
    ALTERED,
    DIGEST,
    SHORTER,
    NativeStore,
    PieceOfFile,
    StackInSlots,
    StoreCounts,
    StoreOptions,
)
from moec.runtime.expert_store.slot_memory import allocate, opened_past_cache
from moec.runtime.expert_store.slots import LayerSize
from moec.runtime.package import Package, Stack, stored

DIRECT, BUFFERED = "direct", "buffered"
DIRECT_READERS = 2


@dataclass(frozen=True)
class StoreReport:
    """How the experts of a model are held: slots and experts of each layer, the bytes of all slots
    and of all experts, how files are read (`direct` past the page cache, or `buffered`), and what
    was counted since the start."""

    layers: tuple[str, ...]
    slots: tuple[int, ...]
    experts: tuple[int, ...]
    slot_bytes: int
    expert_bytes: int
    reading: str
    counts: StoreCounts


@dataclass(frozen=True)
class SlotArrays(CheckedArrays):
    """The arrays of a model: `in_memory` are the slots of experts and the keys of stacks, and the
    others are `mapped`. Where the file may have changed, the `store` hashes what it reads again."""

    mapped: MappedArrays
    in_memory: Mapping[str, Array]
    device: StoringCpu

    def check_unchanged(self) -> None:
        if self.mapped.check_unchanged():
            self.device.store.distrust()

    def __getitem__(self, name: str) -> Array:
        return self.in_memory[name] if name in self.in_memory else self.mapped[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.mapped.stored, **self.in_memory})

    def __len__(self) -> int:
        return len({**self.mapped.stored, **self.in_memory})


class StoringCpu(Cpu):
    """A CPU on which functions read experts from disk."""

    def __init__(
        self,
        opened: Artifact,
        arrays: MappedArrays,
        slots: tuple[int, ...],
        reading: str,
        options: StoreOptions | None,
        caches: int | None = None,
    ) -> None:
        """`caches`: the most bytes of caches of texts."""
        assert opened.package.store is not None
        self._path, self._layers, self._slots = opened.path, opened.package.store.layers, slots
        self._sizes, self._caches = sizes_of(opened.package, arrays), caches
        self._mapped = arrays
        self._files: dict[OpenFile, int] = {}
        counts = [n for n, layer in zip(slots, self._layers, strict=True) for _ in layer]
        self._stacks = [stack for layer in self._layers for stack in layer]
        shapes = [
            ((count, *arrays.stored[name].shape[1:]), NUMPY[arrays.stored[name].dtype])
            for count, stack in zip(counts, self._stacks, strict=True)
            for name in stack.arrays
        ]
        self._memory, in_slots = allocate(shapes)
        names = [name for stack in self._stacks for name in stack.arrays]
        self._in_slots = dict(zip(names, in_slots, strict=True))
        self._digests = _digests_by_array(opened, [n for s in self._stacks for n in s.arrays])
        self._keys = {stack.key: np.zeros(2, np.int64) for stack in self._stacks}
        self.in_memory: Mapping[str, Array] = {**self._in_slots, **self._keys}
        self.reading = self._read_past_cache() if reading == DIRECT else BUFFERED
        readers = DIRECT_READERS if self.reading == DIRECT else 1
        options = options or StoreOptions()
        self._options = replace(options, readers=options.readers or readers)

    def check_caches(self, size: int) -> None:
        """Raises InputError where texts need more than the limit of memory leaves them."""
        if self._caches is not None and size > self._caches:
            raise InputError(
                f"the caches of the texts take {show_bytes(size)}, and memory has room for "
                f"{show_bytes(self._caches)} of them: give fewer or shorter texts at once"
            )

    def functions(self, package: Package) -> Mapping[str, Any]:
        """Raises ArtifactError where the library does not load, or has no store."""
        opened = open_library(package.library, map(stored, package.functions), self._open)
        return {name: opened[stored(name)] for name in package.functions}

    def _open(self, library: Any) -> None:
        stacks: list[StackInSlots] = []
        for number, (layer, slots) in enumerate(zip(self._layers, self._slots, strict=True)):
            first = len(stacks)
            stacks += [
                StackInSlots(
                    number, first, len(layer), self._sizes[number].experts, slots,
                    tuple(map(self._piece, stack.arrays)),
                )
                for stack in layer
            ]  # fmt: skip
        self.store = NativeStore(library.get_function, stacks, self._options, self._memory)
        for number, stack in enumerate(self._stacks):
            self._keys[stack.key][:] = self.store.address, number

    def _piece(self, name: str) -> PieceOfFile:
        file_part, array = self._mapped.file_part(name), self._in_slots[name]
        past_cache = self._files.get(file_part.file)
        return PieceOfFile(
            file_part.start,
            file_part.size // self._mapped.stored[name].shape[0],
            array.ctypes.data,
            self._digests[name],
            file_part.file.descriptor if past_cache is None else past_cache,
            past_cache is not None,
        )

    def _read_past_cache(self) -> str:
        stored = [name for stack in self._stacks for name in stack.arrays]
        files = {self._mapped.file_part(name).file for name in stored}
        opened = {file: opened_past_cache(file) for file in files}
        self._files = {file: number for file, number in opened.items() if number is not None}
        return DIRECT if len(self._files) == len(files) else BUFFERED

    def refusal(self, line: str) -> MoecError:
        failed = self.store.failed_read()
        if failed is None:
            return super().refusal(line)
        stack = self._stacks[failed.stack]
        why = {
            SHORTER: "cannot be read: the file has become shorter",
            ALTERED: "was altered: its SHA-256 differs; compile or copy the artifact again",
        }.get(failed.error, f"cannot be read: {os.strerror(max(0, failed.error))}")
        return ArtifactError(f"{self._path}: expert {failed.expert} of {stack.layer} {why}")

    def report(self) -> StoreReport:
        return StoreReport(
            tuple(layer[0].layer for layer in self._layers),
            self._slots,
            tuple(size.experts for size in self._sizes),
            sum(n * size.expert_bytes for n, size in zip(self._slots, self._sizes, strict=True)),
            sum(size.experts * size.expert_bytes for size in self._sizes),
            self.reading,
            self.store.counts(),
        )


def _digests_by_array(opened: Artifact, names: Sequence[str]) -> dict[str, bytes]:
    """The digests of the experts of each array, which the artifact has in the order of `names`."""
    digests, at = {}, 0
    for name in names:
        end = at + DIGEST * opened.manifest.arrays[name].shape[0]
        digests[name] = opened.expert_digests[at:end]
        at = end
    if at != len(opened.expert_digests):
        raise ArtifactError(f"{opened.path}: its digests of experts are not those of its arrays")
    return digests


def sizes_of(package: Package, arrays: MappedArrays) -> list[LayerSize]:
    assert package.store is not None
    return [_size(layer, arrays) for layer in package.store.layers]


def _size(layer: Sequence[Stack], arrays: MappedArrays) -> LayerSize:
    held = [arrays.stored[name] for stack in layer for name in stack.arrays]
    experts = held[0].shape[0]
    return LayerSize(experts, sum(array.nbytes // experts for array in held))
