"""The weights of an artifact: verified on the first access, and bound to files that stay open."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from moec.errors import ArtifactError
from moec.runtime.artifact.container import Container
from moec.runtime.artifact.manifest import Manifest, ManifestPart, Stored
from moec.runtime.artifact.open_file import FileState, OpenFile
from moec.runtime.artifact.part_writers import Buffer, on_all_cores
from moec.runtime.dtypes import NUMPY, Array


class MappedArrays(Mapping[str, Array]):
    """The memory-mapped arrays of an artifact. The first access waits until all are verified."""

    def __init__(
        self, path: Path, container: Container, manifest: Manifest, arrays: Mapping[str, Stored]
    ) -> None:
        self._path, self._manifest, self._arrays = path, manifest, arrays
        self._parts = {a.part: container[a.part] for a in arrays.values()}
        self._lock, self._verified = threading.Lock(), False
        self._states = {file: file.state for file in container.files(self._parts)}

    def verify(self) -> None:
        with self._lock:
            if not self._verified:
                self._check_content({file: file.current() for file in self._states})
                check_digests(self._path, self._parts, self._manifest.parts)
                self._verified = True

    def check_unchanged(self) -> None:
        """Raises ArtifactError where a file was written to since it was opened, as weights that
        have not been read yet may have changed.

        A file that was only renamed, linked or unlinked looks like one whose time of writing was
        set back: the weights are then hashed again, once.
        """
        current = {file: file.current() for file in self._states}
        if current != self._states:
            with self._lock:
                self._check_again(current)

    def _check_content(self, current: Mapping[OpenFile, FileState]) -> None:
        """Before anything is read: reading a file that was cut ends the process."""
        for file, state in current.items():
            if not state.same_content(self._states[file]):
                raise _changed(file.path)

    def _check_again(self, current: Mapping[OpenFile, FileState]) -> None:
        self._check_content(current)
        try:
            check_digests(self._path, self._parts, self._manifest.parts)
        except ArtifactError:
            raise _changed(self._path) from None
        self._states |= current

    def __getitem__(self, name: str) -> Array:
        stored = self._arrays[name]
        self.verify()
        return array_of(stored, self._parts[stored.part])

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


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
    path: Path, contents: Mapping[str, memoryview], parts: Mapping[str, ManifestPart]
) -> None:
    """Raises ArtifactError where a part is altered."""
    for name, digest in zip(contents, _digests(contents.values()), strict=True):
        if digest != parts[name].sha256:
            raise ArtifactError(
                f"{path}: {name} was altered: its SHA-256 differs; "
                "compile or copy the artifact again"
            )


def _digests(contents: Iterable[Buffer]) -> list[str]:
    """SHA-256 of each, on all cores: hashlib lets other threads run meanwhile."""
    buffers = list(contents)
    return on_all_cores(_digest, buffers, [memoryview(buffer).nbytes for buffer in buffers])


def _digest(content: Buffer) -> str:
    return hashlib.sha256(content).hexdigest()
