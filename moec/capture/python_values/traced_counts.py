"""Numbers that a trace changes: they count calls in branches that the example does not take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from moec.capture.python_values.reach import snapshot
from moec.capture.python_values.slots import Slot

_COUNTS: ContextVar[list[Slot] | None] = ContextVar("counts", default=None)


@contextmanager
def counts_noted() -> Iterator[list[Slot]]:
    """The list, to which traces add the slots whose number they change, while open."""
    counts: list[Slot] = []
    token = _COUNTS.set(counts)
    try:
        yield counts
    finally:
        _COUNTS.reset(token)


@contextmanager
def as_traced(module: torch.nn.Module) -> Iterator[None]:
    """Around the module's forward in a trace. When a trace ends, torch.export puts numbers back."""
    before = snapshot(module)
    yield
    counts = _COUNTS.get()
    if counts is not None:
        counts += before.counted(snapshot(module))
