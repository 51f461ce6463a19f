"""Memory in large pages, for tensors that are made anew at every step.

A gradient as large as the weights is written to memory that the system has just given out, page
by page: of 4 KiB each, that took longer than all products of a layer (537 MB: 130 ms, and 40 to
give it back; in pages of 2 MiB, 30 and 1).
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

from torch import Tensor

LARGE = 2 * 2**20  # bytes


def advise_huge_pages(tensor: Tensor) -> Tensor:
    """The same tensor, nothing of which was written yet; the system is asked for large pages
    where it can be, and may not give them."""
    advise, start, size = _madvise(), tensor.data_ptr(), tensor.nbytes
    first = -(-start // LARGE) * LARGE
    last = (start + size) // LARGE * LARGE
    if advise is not None and first < last:
        advise(first, last - first, mmap.MADV_HUGEPAGE)
    return tensor


@cache
def _madvise() -> Any:
    """The system's function, or None where it has none."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
