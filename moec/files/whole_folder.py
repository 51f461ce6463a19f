"""Atomic writes of folders: a failure leaves the old folder, never a partial one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moec.errors import SetupError, UsageError


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A private folder to write, which replaces `path` when the block ends without an error."""
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        new = temporary / "new"
        new.mkdir()
        yield new
        swap(new, path, temporary / "old")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def swap(new: Path, path: Path, old: Path) -> None:
    """Renames `new` to `path`, and what was there to `old`, or back where that fails: the caller
    removes `old`."""
    existed = path.exists()
    if existed:
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if existed:
            old.rename(path)
        raise


def check_new_folder(path: Path, marker: str, *, force: bool) -> None:
    """Raises UsageError where no folder can be written at `path`, or something exists there that
    must not be replaced: with `force`, only a folder that holds a file `marker` is."""
    if not path.name or "\0" in str(path):
        raise UsageError(f"{path} is not a valid name of a folder")
    if not path.parent.is_dir():
        raise SetupError(f"{path}: the folder {path.parent} does not exist: create it first")
    if not os.access(path.parent, os.W_OK):
        raise SetupError(f"{path} cannot be written: permission denied in {path.parent}")
    if not path.exists():
        return
    if not force:
        raise SetupError(f"{path} exists; --force replaces it")
    if path.is_symlink() or not (path / marker).is_file():
        raise SetupError(f"{path} is no folder with a {marker}, so --force does not replace it")


def check_room(path: Path, size: int) -> None:
    """Raises UsageError where the disk of `path` lacks room for `size` bytes."""
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise SetupError(
            f"{path} needs {size / 1e9:.3f} GB, and {free / 1e9:.3f} GB are free in {path.parent}: "
            "free some space, or choose a folder on another disk"
        )
