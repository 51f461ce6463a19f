"""Where the weights of a compilation are: in memory, or paged from a checkpoint and in a file."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from moec.runtime.checks import show_bytes
from moec.runtime.dtypes import Array
from moec.sources.memory.budget import MemoryBudget
from moec.sources.memory.paged import PagedWeights, ReadsWeights
from moec.sources.memory.ranges import PAGE
from moec.sources.memory.spool import Spool

_PERIOD = 0.02  # seconds
_MOST_OVER = 5
"""Periods in a row above the limit, after which a compilation ends."""
_LIBC = ctypes.CDLL(None)
_TRIM, _MAP, _ARENAS = -1, -3, -8  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX of mallopt(3)
_RAISED = 32 << 20
"""As far glibc itself raises the limit of blocks that it maps, once one of that size was freed."""


class InMemory:
    """Weights in memory, as torch and numpy hold them."""

    paged: PagedWeights | None = None
    note = ""

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While open, weights have their values, and the process keeps what it frees: glibc maps
        each large tensor anew, and to clear its pages takes ten times as long as a cast."""
        if not hasattr(_LIBC, "mallopt"):
            yield
            return
        _LIBC.mallopt(_MAP, 2**31 - 1)
        _LIBC.mallopt(_TRIM, -1)
        try:
            yield
        finally:
            _LIBC.mallopt(_MAP, _RAISED)
            _LIBC.mallopt(_TRIM, 2 * _RAISED)
            _LIBC.malloc_trim(0)

    @contextmanager
    def share_values(self) -> Iterator[None]:
        """While open, weights may have the values of others of their shape."""
        yield

    def check_room(self, size: float) -> None:
        """Raises UsageError where weights of `size` bytes cannot be stored."""

    def fill(self, weights: Sequence[Tensor]) -> None:
        """Give the weights their values, for code that reads them without operators of torch."""

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """A weight of a model in another dtype."""
        return weight.to(dtype)

    def tensor(self, tensor: Tensor) -> Tensor:
        """A weight that a pass computed."""
        return tensor

    def array(self, array: Array) -> Array:
        """An array of a package."""
        return array


class Bounded(InMemory):
    """Weights of a checkpoint are read when they are needed, and those that are computed are kept
    in a file, in a process that takes at most the limit of a budget: half of what the budget leaves
    is for weights as they are read, and half for those of the file."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget = budget
        self._limit, self._spool = budget.left // 2, Spool()
        self.note = (
            "weights stayed in files while the model was compiled, with at most "
            f"{show_bytes(budget.limit)} of memory (--memory)"
        )
        self.paged: PagedWeights = PagedWeights(self._limit, self._spool)
        # each thread of an evaluation would keep what it freed in an arena of its own
        _LIBC.mallopt(_ARENAS, 2)

    @contextmanager
    def reading(self) -> Iterator[None]:
        self.paged.failure = None
        stopped = threading.Event()
        thread = threading.Thread(target=self._keep_until, args=(stopped,), daemon=True)
        thread.start()
        try:
            with ReadsWeights(self.paged):
                yield
        except Exception as error:
            if self.paged.failure is not None:
                raise self.paged.failure from error
            raise
        else:
            if self.paged.failure is not None:
                raise self.paged.failure
        finally:
            stopped.set()
            thread.join()
            self.paged.drop()
            self._spool.discard()

    @contextmanager
    def share_values(self) -> Iterator[None]:
        with self.paged.share_values():
            yield

    def check_room(self, size: float) -> None:
        self._spool.check_room(int(size))

    def fill(self, weights: Sequence[Tensor]) -> None:
        self.paged.fill(weights)

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if weight.dtype == dtype or not self.paged.contains(weight):
            return weight.to(dtype)
        return self.paged.cast(weight, dtype)

    def tensor(self, tensor: Tensor) -> Tensor:
        return tensor if self.paged.contains(tensor) else self._spool.tensor(tensor)

    def array(self, array: Array) -> Array:
        return self._spool.array(array)

    def _keep_until(self, stopped: threading.Event) -> None:
        """Discard what was read of the file whenever that is more than its part. Above the limit,
        give back what is free and all weights but those of one operator, or end the compilation."""
        before, over = _mapped_bytes(), 0
        while not stopped.wait(_PERIOD):
            above = self.budget.over() > 0
            if above or _mapped_bytes() > before + self._limit:
                self._spool.discard()
            if above:
                self.paged.limit = 0
                _LIBC.malloc_trim(0)
            over = over + 1 if above and self.budget.over() > 0 else 0
            if over > _MOST_OVER:
                self.paged.failure = self.budget.exceeded(self.budget.limit + self.budget.over())


def _mapped_bytes() -> int:
    """The bytes of files that are mapped and in memory, of this process."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * PAGE
