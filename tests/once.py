"""Folders that all tests of a run share, in whichever process they run."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

Once = Callable[[str, Callable[[Path], None]], Path]
"""The fixture `once`: a folder by its name, which the function fills where no test has yet."""


def folders_in(root: Path) -> Once:
    """Folders below `root`."""

    def folder(name: str, fill: Callable[[Path], None]) -> Path:
        path, done = root / f"once-{name}", root / f"once-{name}.done"
        with (root / f"once-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                path.mkdir(exist_ok=True)
                fill(path)
                done.touch()
        return path

    return folder
