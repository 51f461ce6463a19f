"""What traces change among the Python values of a module, also in branches that the example does
not take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from moec.capture.state.reach import snapshot
from moec.capture.state.snapshot import Slot


@dataclass
class TracedChanges:
    """`slots` are those that traces change, and `counts` those whose number they change."""

    slots: list[Slot] = field(default_factory=list)
    counts: list[Slot] = field(default_factory=list)


_CHANGES: ContextVar[TracedChanges | None] = ContextVar("changes", default=None)


@contextmanager
def changes_noted() -> Iterator[TracedChanges]:
    """What traces change, while open."""
    changes = TracedChanges()
    token = _CHANGES.set(changes)
    try:
        yield changes
    finally:
        _CHANGES.reset(token)


@contextmanager
def as_traced(module: torch.nn.Module) -> Iterator[None]:
    """Around the module's forward in a trace. When a trace ends, torch.export puts numbers back."""
    changes = _CHANGES.get()
    if changes is None:
        yield
        return
    before = snapshot(module)
    yield
    later = snapshot(module)
    changes.slots += before.changed(later)
    changes.counts += [slot for slot, _ in before.counted(later)]
