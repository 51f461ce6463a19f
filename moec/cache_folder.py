"""Folders for what is kept between processes: for their owner alone, entries found by a key."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from moec.errors import UsageError


def default_folder(kind: str) -> Path:
    """$MOEC_CACHE, which holds every kind of entry, or moec/`kind` in the user's cache."""
    if given := os.environ.get("MOEC_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moec" / kind


def key_of(*parts: object) -> str:
    """The SHA-256 of what an entry depends on, as text."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def make(folder: Path, why: str) -> None:
    """Make the folder, where it is not there, for its owner alone.

    Raises UsageError where it cannot be made, or others may write it: `why` ends the sentence.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the cache {folder} cannot be made: {error.strerror}") from error
    if not private(folder):
        raise UsageError(f"the cache {folder} is not yours alone, {why}")


def private(path: Path) -> bool:
    """Whether it is the user's, and nobody else may write it."""
    if not hasattr(os, "geteuid"):
        return True
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
