"""The weights of an artifact: verified on the first access, and bound to files that stay open."""

from __future__ import annotations

import hashlib
import threading
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from moec.errors import ArtifactError
from moec.runtime.artifact.container import Container
from moec.runtime.artifact.manifest import Manifest, ManifestPart, Stored
from moec.runtime.artifact.open_file import FilePart, FileState, OpenFile
from moec.runtime.artifact.part_writers import BLOCK_BYTES, on_all_cores
from moec.runtime.dtypes import NUMPY, Array


class CheckedArrays(Mapping[str, Array]):
    """Arrays that a write to a file may change while they are in use."""

    @abstractmethod
    def check_unchanged(self) -> object:
        """Raises ArtifactError where a file was written to since it was opened."""


class MappedArrays(CheckedArrays):
    """The memory-mapped arrays of an artifact. The first access waits until all are verified."""

    def __init__(
        self,
        path: Path,
        container: Container,
        manifest: Manifest,
        arrays: Mapping[str, Stored],
        streamed: Collection[str] = (),
        *,
        verified: bool = False,
    ) -> None:
        """The arrays in `streamed` are never mapped: they are verified by reading their parts, or
        are `verified` by who reads them."""
        self.path, self._container, self._manifest, self.stored = path, container, manifest, arrays
        self._names = tuple({array.part: None for array in arrays.values()})
        self._streamed = {arrays[name].part for name in streamed}
        self._hashed = [n for n in self._names if not (verified and n in self._streamed)]
        self._lock, self._verified = threading.Lock(), False
        self._states = {file: file.state for file in container.files(self._names)}

    def streaming(self, names: Collection[str], *, verified: bool) -> MappedArrays:
        """The same arrays, none of which is mapped: those of `names` are read by others, and the
        rest is in memory. Raises ArtifactError where the file is cut meanwhile."""
        streamed = {self.stored[name].part for name in names}
        for part in self._names:
            if part not in streamed:
                self._container.held(part)
        return MappedArrays(
            self.path, self._container, self._manifest, self.stored, names, verified=verified
        )

    def file_part(self, name: str) -> FilePart:
        """Where an array is; nothing of it is verified."""
        return self._container.file_parts[self.stored[name].part]

    @property
    def _parts(self) -> dict[str, memoryview | FilePart]:
        return {
            name: self._container.file_parts[name]
            if name in self._streamed
            else self._container[name]
            for name in self._hashed
        }

    def verify(self) -> None:
        with self._lock:
            if not self._verified:
                self._check_content({file: file.current() for file in self._states})
                check_digests(self.path, self._parts, self._manifest.parts)
                self._verified = True

    def check_unchanged(self) -> bool:
        """Raises ArtifactError where a file was written to since it was opened, as weights that
        have not been read yet may have changed. Returns whether that had to be verified.

        A file that was only renamed, linked or unlinked looks like one whose time of writing was
        set back: the weights are then hashed again, once.
        """
        current = {file: file.current() for file in self._states}
        if current != self._states:
            with self._lock:
                self._check_again(current)
            return True
        return False

    def _check_content(self, current: Mapping[OpenFile, FileState]) -> None:
        """Before anything is read: reading a file that was cut ends the process."""
        for file, state in current.items():
            if not state.same_content(self._states[file]):
                raise _changed(file.path)

    def _check_again(self, current: Mapping[OpenFile, FileState]) -> None:
        self._check_content(current)
        try:
            check_digests(self.path, self._parts, self._manifest.parts)
        except ArtifactError:
            raise _changed(self.path) from None
        self._states |= current

    def __getitem__(self, name: str) -> Array:
        stored = self.stored[name]
        self.verify()
        return array_of(stored, self._container[stored.part])

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def _changed(path: Path) -> ArtifactError:
    return ArtifactError(
        f"{path} was changed while the model in it is in use: load it again. To replace an "
        "artifact that may be in use, write a new file and rename it over the old one"
    )


def array_of(stored: Stored, part: memoryview) -> Array:
    """The array whose bytes are `part`."""
    array: Array = np.frombuffer(part, NUMPY[stored.dtype]).reshape(stored.shape)
    return array


def check_digests(
    path: Path, contents: Mapping[str, memoryview | FilePart], parts: Mapping[str, ManifestPart]
) -> None:
    """Raises ArtifactError where a part, in memory or in a file, is altered."""
    for name, digest in zip(contents, _digests(contents.values()), strict=True):
        if digest != parts[name].sha256:
            raise ArtifactError(
                f"{path}: {name} was altered: its SHA-256 differs; "
                "compile or copy the artifact again"
            )


def _digests(contents: Iterable[memoryview | FilePart]) -> list[str]:
    """SHA-256 of each, on all cores: hashlib lets other threads run meanwhile."""
    buffers = list(contents)
    sizes = [part.size if isinstance(part, FilePart) else part.nbytes for part in buffers]
    return on_all_cores(_digest, buffers, sizes)


def _digest(content: memoryview | FilePart) -> str:
    if not isinstance(content, FilePart):
        return hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256()
    for block in content.blocks(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()
