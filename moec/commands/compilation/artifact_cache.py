"""Caches artifacts, by checkpoint and options of their compilation (see checkpoint_key.py).

Factories (file.py:factory) are compiled each time, because their code may depend on anything.
An artifact that is larger than a fraction of the cache is stored as a frame, without the weights
that follow from the checkpoint's files (see artifact_frame.py). Where a frame is too large as well,
as weights were computed, the model is compiled each time.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from moec.cache import ARTIFACTS, FRAMES, Store, load, save, starts_with
from moec.errors import UsageError
from moec.files.os_errors import reason
from moec.runtime.artifact.container import replaceable

if TYPE_CHECKING:
    from moec.commands.compilation.artifact_frame import Frame
    from moec.commands.compilation.checkpoint_key import CheckpointKey
    from moec.model.compiled import CompiledModel

CACHE_FRACTION = 8
"""An artifact or a frame may take up to one part in this many of the cache."""


def may_hold(store: Store, key: CheckpointKey) -> bool:
    """Whether an artifact of such a model and options is stored, of these or other weights."""
    return any(starts_with(store, kind, key.start) for kind in (ARTIFACTS, FRAMES))


def fetch(
    store: Store, key: str, checkpoint: Path, output: Path, *, overwrite: bool = False
) -> bool:
    """Write the cached artifact of a key, which is of `checkpoint`, to the file `output`; returns
    whether that was done.

    It is not done where nothing is cached, or where `output` exists and must not be replaced.
    Raises UsageError where `output` cannot be written.
    """
    if output.exists() and (not overwrite or output.is_dir() or not replaceable(output)):
        return False
    content = load(store, ARTIFACTS, key)
    frame = None if content is not None else _frame(store, key)
    if content is None and frame is None:
        return False
    try:
        with tempfile.TemporaryDirectory(prefix=".moec-", dir=output.parent) as folder:
            path = Path(folder) / output.name
            if content is not None:
                path.write_bytes(content)
            elif frame is not None and not _complete(frame, checkpoint, path):
                return False
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


def keep(store: Store, key: str, checkpoint: Path, output: Path, compiled: CompiledModel) -> None:
    """Cache the artifact in `output` of a model that was compiled from `checkpoint`: as it is, or
    its frame, unless that is too large too."""
    most = store.limit // CACHE_FRACTION
    if not output.is_file():
        return
    if output.stat().st_size <= most:
        save(store, ARTIFACTS, {key: output.read_bytes()})
        return
    from moec.commands.compilation import artifact_frame

    frame = artifact_frame.frame_of(compiled, output, checkpoint, most)
    if frame is not None:
        save(store, FRAMES, {key: artifact_frame.encode(frame)})


def _frame(store: Store, key: str) -> Frame | None:
    content = load(store, FRAMES, key)
    if content is None:
        return None
    from moec.commands.compilation import artifact_frame

    return artifact_frame.decode(content)


def _complete(frame: Frame, checkpoint: Path, output: Path) -> bool:
    from moec.commands.compilation import artifact_frame

    return artifact_frame.complete(frame, checkpoint, output)
