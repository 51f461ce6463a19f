"""Ranges of addresses whose memory comes and goes while tensors at them stay.

While a range is absent, reading it gives NaN in every floating dtype, and writing to it ends the
process: a value that was not read from its checkpoint is never a plausible number. In tests,
reading it ends the process too (`ABSENT_ACCESS`).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import cache

PAGE = mmap.PAGESIZE
_ABSENT_BYTES = 1 << 24
_NONE = 0  # PROT_NONE
_FIXED = 0x10  # MAP_FIXED
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
ABSENT_ACCESS = mmap.PROT_READ  # 0: none


class MappedRange:
    """`size` bytes at an `address`."""

    size: int
    address: int

    def buffer(self) -> ctypes.Array[ctypes.c_char]:
        """The bytes of the range, which keep it mapped."""
        buffer = (ctypes.c_char * self.size).from_address(self.address)
        buffer.range = self  # type: ignore[attr-defined]
        return buffer


class AddressRange(MappedRange):
    """`size` bytes of addresses, absent at first; unmapped when the last buffer of it is gone."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._length = -(-size // PAGE) * PAGE
        self.address = _map(None, self._length, _NONE, _ANONYMOUS, -1, 0)
        weakref.finalize(self, _unmap, self.address, self._length)
        self.drop()

    def provide(self) -> None:
        """Give the range memory of zeros, to be written to."""
        _map(self.address, self._length, _READ_WRITE, _ANONYMOUS | _FIXED, -1, 0)

    def show(self, file: int, start: int) -> None:
        """Give the range the bytes of a file from `start`, to be read only."""
        flags = mmap.MAP_SHARED | _FIXED
        _map(self.address, self._length, mmap.PROT_READ, flags, file, start)

    def drop(self) -> None:
        """Give the memory back; the range is absent."""
        for start in range(0, self._length, _ABSENT_BYTES):
            length = min(_ABSENT_BYTES, self._length - start)
            flags = mmap.MAP_SHARED | _FIXED
            _map(self.address + start, length, ABSENT_ACCESS, flags, _absent_file(), 0)


class FileRange(MappedRange):
    """Bytes of a file, mapped; `discard` gives back the memory that reading them took."""

    def __init__(self, file: int, start: int, size: int) -> None:
        self.size = size
        self.address = _map(None, size, _READ_WRITE, mmap.MAP_SHARED, file, start)
        weakref.finalize(self, _unmap, self.address, size)

    def discard(self) -> None:
        """Unmap the pages from memory. Their content, also what was written, is in the file."""
        _LIBC.madvise(self.address, self.size, mmap.MADV_DONTNEED)


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _map(address: int | None, length: int, access: int, flags: int, file: int, start: int) -> int:
    """mmap(2). Raises OSError."""
    mapped: int | None = _LIBC.mmap(address, length, access, flags, file, start)
    if mapped is None or mapped == ctypes.c_void_p(-1).value:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), f"{length} bytes of addresses")
    return mapped


def _unmap(address: int, length: int) -> None:
    _LIBC.munmap(address, length)


@cache
def _absent_file() -> int:
    """A file of ones in memory, mapped wherever a range is absent: NaN in every float."""
    file = os.memfd_create("absent")
    os.write(file, b"\xff" * _ABSENT_BYTES)
    return file
