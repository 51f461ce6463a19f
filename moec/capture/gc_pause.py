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
    """As it was before, when left; where objects were set aside already, or nothing is collected,
    that is left alone."""
    if not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(max(_NEW, thresholds[0]), *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
