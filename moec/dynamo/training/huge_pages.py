"""Memory in large pages, for tensors that are allocated anew at every step.

A gradient as large as the weights is written to memory that the system has just allocated, page by
page. With pages of 4 KiB that took longer than all products of a layer (537 MB: 130 ms, and 40 ms
to free it; with pages of 2 MiB, 30 ms and 1 ms).
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

from torch import Tensor

LARGE = 2 * 2**20  # bytes


def advise_huge_pages(tensor: Tensor) -> Tensor:
    """Advise the system to use large pages for a tensor that was not written yet; return the
    tensor. The system may ignore the advice, and platforms without it are left alone."""
    advise, start, size = _madvise(), tensor.data_ptr(), tensor.nbytes
    first = -(-start // LARGE) * LARGE
    last = (start + size) // LARGE * LARGE
    if advise is not None and first < last:
        advise(first, last - first, mmap.MADV_HUGEPAGE)
    return tensor


@cache
def _madvise() -> Any:
    """The system's madvise, or None where it has no advice for large pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
