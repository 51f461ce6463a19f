"""Where the weights of a model come from: pieces of the checkpoint's files.

A weight in memory is one tensor of a .safetensors file, or several in a row (the matrices of the
experts, which a model stacks). They are recognised by their bytes, not by their names, which
libraries change. Large tensors are compared at samples only: who reads files in place of weights
compares a hash of the result.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from moec.runtime.arrays.strided_copy import StridedCopy
from moec.runtime.dtypes import Array

_KEY = 64  # bytes at the start of a tensor by which it is looked up
SAMPLES, SAMPLE_BYTES = 16, 4096
"""How much of a large array is compared with what it was copied from."""
MOST_COPIES = 1 << 16
"""Copies of one array; more take longer to describe than to compile."""


@dataclass(frozen=True)
class StoredTensor:
    """The bytes of a tensor: `size` of them at `offset` in file number `file`."""

    file: int
    offset: int
    size: int


@dataclass(frozen=True)
class LocatedTensor:
    """The bytes in memory, from the address `start`, that equal those of a tensor."""

    start: int
    tensor: StoredTensor

    @property
    def end(self) -> int:
        return self.start + self.tensor.size


@dataclass(frozen=True)
class Origins:
    """The pieces of memory that tensors in files explain, in the order of their addresses."""

    pieces: tuple[LocatedTensor, ...]

    @cached_property
    def _starts(self) -> list[int]:
        return [piece.start for piece in self.pieces]

    def copies(self, base: int, pairs: Sequence[tuple[Array, Array]]) -> list[StridedCopy] | None:
        """The copies from files that do what these copies from memory do. Each pair is a view of an
        array, which starts at the address `base`, and the view of a weight that is copied there.
        None where a weight is in no file."""
        copies: list[StridedCopy] = []
        for target, source in (part for pair in pairs for part in self._split(*pair)):
            piece = self._around(source)
            if piece is None or len(copies) == MOST_COPIES:
                return None
            copies.append(
                StridedCopy(
                    piece.tensor.file, source.itemsize, source.shape,
                    piece.tensor.offset + _address(source) - piece.start, source.strides,
                    _address(target) - base, target.strides,
                )
            )  # fmt: skip
        return copies

    def _split(self, target: Array, source: Array) -> Iterator[tuple[Array, Array]]:
        """A copy as copies that read one piece each; a part for which there is none is left."""
        if source.size == 0:
            return
        if source.size == 1 or self._around(source) is not None:
            yield target, source
            return
        axes = [axis for axis in range(source.ndim) if source.shape[axis] > 1]
        axis = max(axes, key=lambda axis: abs(_span(source, axis)))
        for index in range(source.shape[axis]):
            part = (slice(None),) * axis + (slice(index, index + 1),)
            yield from self._split(target[part], source[part])

    def _around(self, view: Array) -> LocatedTensor | None:
        """The piece that holds all of a view."""
        start = _address(view)
        index = bisect_right(self._starts, start) - 1
        if index < 0 or min(view.strides, default=0) < 0:
            return None
        end = start + view.itemsize + sum(_span(view, axis) for axis in range(view.ndim))
        return self.pieces[index] if end <= self.pieces[index].end else None


def origins_of(files: Sequence[tuple[Path, memoryview]], memories: Sequence[Array]) -> Origins:
    """Finds the tensors of .safetensors files in blocks of memory, u8[N] each."""
    contents = [content for _, content in files]
    by_key = _tensors(files)
    pieces = (piece for memory in memories for piece in _pieces(memory, contents, by_key))
    return Origins(tuple(sorted(pieces, key=lambda piece: piece.start)))


def _tensors(files: Sequence[tuple[Path, memoryview]]) -> Mapping[bytes, list[StoredTensor]]:
    """The tensors in files by their first bytes, the largest first."""
    by_key: dict[bytes, list[StoredTensor]] = {}
    for number, (_, content) in enumerate(files):
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(bytes(content[8:start]))
        for name, tensor in header.items():
            if name != "__metadata__":
                first, last = (start + offset for offset in tensor["data_offsets"])
                key = bytes(content[first : min(last, first + _KEY)])
                by_key.setdefault(key, []).append(StoredTensor(number, first, last - first))
    for tensors in by_key.values():
        tensors.sort(key=lambda tensor: -tensor.size)
    return by_key


def _pieces(
    memory: Array,
    contents: Sequence[memoryview],
    by_key: Mapping[bytes, Sequence[StoredTensor]],
) -> Iterator[LocatedTensor]:
    """The tensors of which a block of memory consists, up to the first bytes of another origin."""
    while memory.nbytes:
        for tensor in by_key.get(memory[:_KEY].tobytes(), ()):
            content = np.frombuffer(contents[tensor.file], np.uint8, tensor.size, tensor.offset)
            if tensor.size <= memory.nbytes and _equal(memory[: tensor.size], content):
                yield LocatedTensor(_address(memory), tensor)
                memory = memory[tensor.size :]
                break
        else:
            return


def _address(array: Array) -> int:
    return int(array.ctypes.data)


def _span(view: Array, axis: int) -> int:
    """The bytes between the first and the last element along an axis."""
    return int((view.shape[axis] - 1) * view.strides[axis])


def _equal(memory: Array, content: Array) -> bool:
    """Whether equally many bytes are equal, or, where they are many, samples of them."""
    if memory.nbytes <= SAMPLES * SAMPLE_BYTES:
        return np.array_equal(memory, content)
    last = memory.nbytes - SAMPLE_BYTES
    starts = (last * i // (SAMPLES - 1) for i in range(SAMPLES))
    return all(
        np.array_equal(memory[s : s + SAMPLE_BYTES], content[s : s + SAMPLE_BYTES]) for s in starts
    )
