"""Where the weights of a compilation are: in memory, or paged from a checkpoint and in a file."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from moec.memory.paged import PagedWeights, ReadsWeights
from moec.memory.ranges import PAGE
from moec.memory.spool import Spool
from moec.runtime.checks import show_bytes
from moec.runtime.dtypes import Array

_PERIOD = 0.02  # seconds
_PARTS = 8
"""A process holds this part of its limit in weights as they are read, and as much in weights of the
file; the rest is for the operators, of which one in float32 takes thrice its weights."""


class InMemory:
    """Weights in memory, as torch and numpy hold them."""

    paged: PagedWeights | None = None
    note = ""

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While open, weights have their values."""
        yield

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
    in a file, in a process that is to take about `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._limit, self._spool = limit // _PARTS, Spool()
        self.note = (
            "weights stayed in files while the model was compiled, with about "
            f"{show_bytes(limit)} of memory (--memory)"
        )
        self.paged: PagedWeights = PagedWeights(self._limit, self._spool)

    @contextmanager
    def reading(self) -> Iterator[None]:
        self.paged.failure = None
        stopped = threading.Event()
        thread = threading.Thread(target=self._discard_until, args=(stopped,), daemon=True)
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

    def _discard_until(self, stopped: threading.Event) -> None:
        """Discard what was read of the file whenever that is more than the limit."""
        before = _mapped_bytes()
        while not stopped.wait(_PERIOD):
            if _mapped_bytes() > before + self._limit:
                self._spool.discard()


def _mapped_bytes() -> int:
    """The bytes of files that are mapped and in memory, of this process."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * PAGE
