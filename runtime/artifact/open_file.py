"""A file of an artifact that is mapped and stays open, so that later writes are detected.

Its path may lead to another file by then: a link was switched, or the file was renamed. What is
compared is therefore the open file. A write during a call of a kernel is not detected; a private
copy is not affected by any.
"""

from __future__ import annotations

import mmap
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

from moec.errors import ArtifactError


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
    """The file at `path`. `content` is a private mapping: writing to it does not change the
    file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        file = path.open("rb", buffering=0)
        weakref.finalize(self, file.close)
        self._descriptor = file.fileno()
        self.state = self.current()
        self.content = (
            memoryview(mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY))
            if self.state.size
            else memoryview(b"")
        )

    def current(self) -> FileState:
        return FileState.of(self._descriptor)


def private_copy(path: Path) -> memoryview:
    """The bytes of the file at `path`, in memory of this process and aligned to a page.

    Raises ArtifactError where the memory does not hold them, or the file is cut meanwhile.
    """
    from moec.runtime.checks import free_memory  # imports numpy

    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > (free := free_memory()):
            raise ArtifactError(
                f"{path}: its copy takes {size:,} bytes, and {free:,} bytes of memory are free; "
                "load it without copy"
            )
        content = memoryview(mmap.mmap(-1, size) if size else b"")
        at = 0
        while at < size:
            if not (count := file.readinto(content[at:])):
                raise ArtifactError(f"{path} was cut while it was read: load it again")
            at += count
    return content
