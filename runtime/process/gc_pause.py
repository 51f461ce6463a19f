"""Less frequent garbage collection while libraries are imported and a model is compiled.

Imports, export and lowering create hundreds of thousands of objects. Each collection that this
triggers would also traverse the permanent objects of torch and transformers. Objects that exist
already are therefore frozen, and collections start less often.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_NEW = 20_000
"""New objects until the next collection of the youngest generation."""


@contextmanager
def gc_paused() -> Iterator[None]:
    """While open, collections are rarer; on leaving, the previous settings are restored.

    Does nothing where the collector is disabled, is as rare already, or has frozen objects.
    """
    thresholds = gc.get_threshold()
    # Checked last, because it is slow: Python counts the frozen objects one by one.
    if not gc.isenabled() or thresholds[0] >= _NEW or gc.get_freeze_count():
        yield
        return
    gc.freeze()
    gc.set_threshold(_NEW, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


@contextmanager
def gc_deferred() -> Iterator[None]:
    """For imports, which create little garbage: while open, nothing is collected. On leaving, all
    objects count as old, so that the next collection does not visit them.

    Does nothing where the collector is disabled or has frozen objects.
    """
    if not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # into the oldest generation
        gc.enable()
