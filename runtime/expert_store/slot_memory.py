"""The memory of slots, and the files that they are filled from."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence
from math import prod

import numpy as np

from moec.errors import SetupError
from moec.runtime.artifact.open_file import OpenFile
from moec.runtime.checks import show_bytes
from moec.runtime.dtypes import Array


def allocate(shapes: Sequence[tuple[tuple[int, ...], np.dtype]]) -> tuple[mmap.mmap, list[Array]]:
    """Arrays that each begin at a page, and their memory, all of which the process takes now: a
    limit is then exceeded when a model is loaded, not while it runs.

    Raises UsageError where the system does not give so much.
    """
    sizes = [prod(shape) * dtype.itemsize for shape, dtype in shapes]
    pages = [-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        memory = mmap.mmap(-1, max(sum(pages), mmap.PAGESIZE), flags=flags)
    except OSError as error:
        raise SetupError(
            f"the system does not give {show_bytes(sum(pages))} for experts: lower the memory"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 0
    arrays, at = [], 0
    for (shape, dtype), size in zip(shapes, pages, strict=True):
        array: Array = np.frombuffer(memory, dtype, prod(shape), at).reshape(shape)
        arrays.append(array)
        at += size
    return memory, arrays


def opened_past_cache(file: OpenFile) -> int | None:
    """A descriptor of the same file whose reads pass the system's page cache; None where the file
    system has none. It is closed with `file`."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return None
    try:
        descriptor = os.open(f"/proc/self/fd/{file.descriptor}", os.O_RDONLY | flag)
    except OSError:
        return None
    weakref.finalize(file, os.close, descriptor)
    return descriptor
