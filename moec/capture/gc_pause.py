"""Fewer looks for garbage while a model is compiled.

Export and lowering make objects by the hundred thousand, and Python looks through all there are for
unreachable ones each time that some more have been made: also through those of torch and
transformers, which stay. They are set aside meanwhile, and it looks less often.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_NEW = 20_000
"""Objects made until those that are new are looked through."""


@contextmanager
def gc_paused() -> Iterator[None]:
    """As it was before, when left. Nothing changes where Python looks as seldom already, where
    objects were set aside already, or where nothing is collected."""
    thresholds = gc.get_threshold()
    # Last, for it takes long: Python counts the objects one by one.
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
