"""A file of an artifact that is mapped and stays open, so that later writes are detected.

Its path may lead to another file by then: a link was switched, or the file was renamed. What is
compared is therefore the open file. A write during a call of a kernel is not detected; a private
copy is not affected by any.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moec.errors import ArtifactError
from moec.files.os_errors import reason
from moec.files.regular_file import open_regular


@dataclass(frozen=True)
class FileState:
    """Which file it is, and its last write, where a program did not set the time back; `change` is
    the time of the last change of content, name, owner or rights, which programs cannot set."""

    device: int
    inode: int
    size: int
    written: int
    change: int

    @staticmethod
    def of(descriptor: int) -> FileState:
        state = os.fstat(descriptor)
        return FileState(
            state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
        )

    def same_content(self, other: FileState) -> bool:
        """Whether the two differ at most in `change`."""
        return (self.device, self.inode, self.size, self.written) == (
            other.device, other.inode, other.size, other.written,
        )  # fmt: skip


class OpenFile:
    """The file at `path`."""

    def __init__(self, path: Path) -> None:
        """Raises ArtifactError where it cannot be opened."""
        self.path = path
        try:
            file = open_regular(path, buffering=0)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {reason(error)}") from error
        weakref.finalize(self, file.close)
        self.descriptor = file.fileno()
        self.state = self.current()

    def current(self) -> FileState:
        return FileState.of(self.descriptor)

    def read(self, start: int, size: int) -> bytes:
        """Fewer bytes at the end of the file."""
        return os.pread(self.descriptor, size, start)


@dataclass(frozen=True)
class FilePart:
    """Some bytes of a file."""

    file: OpenFile
    start: int
    size: int

    def mapped(self) -> memoryview:
        """A private mapping: writing to it does not change the file. Raises ArtifactError where
        the system gives it no addresses."""
        if not self.size:
            return memoryview(b"")
        before = self.start % mmap.ALLOCATIONGRANULARITY
        try:
            mapping = mmap.mmap(
                self.file.descriptor,
                before + self.size,
                access=mmap.ACCESS_COPY,
                offset=self.start - before,
            )
        except OSError as error:
            raise ArtifactError(f"{self.file.path} cannot be mapped: {reason(error)}") from error
        return memoryview(mapping)[before:]

    def blocks(self, size: int) -> Iterator[bytes]:
        """The bytes in order, `size` at a time, fewer where the file was cut."""
        for at in range(0, self.size, size):
            yield self.file.read(self.start + at, min(size, self.size - at))

    def copied(self) -> memoryview:
        """The bytes in memory of this process, aligned to a page. Raises ArtifactError where the
        file is cut meanwhile."""
        content = memoryview(mmap.mmap(-1, self.size) if self.size else b"")
        at = 0
        while at < self.size:
            count = os.preadv(self.file.descriptor, [content[at:]], self.start + at)
            if not count:
                raise ArtifactError(f"{self.file.path} was cut while it was read: load it again")
            at += count
        return content


def check_copy(path: Path, size: int) -> None:
    """Raises ArtifactError where the memory does not hold a copy of `size` bytes."""
    from moec.runtime.checks import free_memory  # imports numpy

    if size > (free := free_memory()):
        raise ArtifactError(
            f"{path}: its copy takes {size:,} bytes, and {free:,} bytes of memory are free; "
            "load it without copy"
        )
