"""How many threads PyTorch runs small models with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 1 << 24
"""Elements of weights below which one core is faster than several that wait for each other."""


@contextmanager
def threads_for(elements: int) -> Iterator[None]:
    """PyTorch with one thread where the weights that it reads have few elements.

    An op on few rows is over before a second thread has woken up; on a machine where others work
    too, each op waits until that thread gets a core.
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
