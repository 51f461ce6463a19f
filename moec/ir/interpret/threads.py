"""The number of threads that PyTorch uses for small models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 1 << 24
"""With fewer elements of weights, one core is faster than several."""


@contextmanager
def threads_for(elements: int) -> Iterator[None]:
    """PyTorch with one thread if the weights that it reads have few elements.

    A small op ends before a second thread has woken up; on a busy machine, each op would wait until
    that thread gets a core.
    """
    before = torch.get_num_threads()
    if before == 1 or elements >= SMALL:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
