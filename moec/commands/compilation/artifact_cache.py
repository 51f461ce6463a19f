"""Caches artifacts, by checkpoint and options of their compilation (see checkpoint_key.py).

Factories (file.py:factory) are compiled each time, because their code may depend on anything.
So is a model whose artifact is larger than a fraction of the cache; its kernels are cached.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from moec.cache import ARTIFACTS, Store, load, save, starts_with
from moec.commands.compilation.checkpoint_key import CheckpointKey
from moec.errors import UsageError
from moec.files.os_errors import reason
from moec.runtime.artifact.container import replaceable

CACHE_FRACTION = 8
"""An artifact may take up to one part in this many of the cache."""


def may_hold(store: Store, key: CheckpointKey) -> bool:
    """Whether an artifact of such a model and options is stored, of these or other weights."""
    return starts_with(store, ARTIFACTS, key.start)


def fetch(store: Store, key: str, output: Path, *, overwrite: bool = False) -> bool:
    """Write the cached artifact of a key to the file `output`; returns whether that was done.

    It is not done where nothing is cached, or where `output` exists and must not be replaced.
    Raises UsageError where `output` cannot be written.
    """
    if output.exists() and (not overwrite or output.is_dir() or not replaceable(output)):
        return False
    content = load(store, ARTIFACTS, key)
    if content is None:
        return False
    try:
        with tempfile.TemporaryDirectory(prefix=".moec-", dir=output.parent) as folder:
            path = Path(folder) / output.name
            path.write_bytes(content)
            if overwrite:
                os.replace(path, output)
                return True
            try:
                os.link(path, output)  # fails if another process has written it meanwhile
            except OSError:
                return False
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {reason(error)}") from error
    return True


def keep(store: Store, key: str, output: Path) -> None:
    """Cache the artifact in `output`, unless it is too large."""
    if output.is_file() and output.stat().st_size <= store.limit // CACHE_FRACTION:
        save(store, ARTIFACTS, {key: output.read_bytes()})
