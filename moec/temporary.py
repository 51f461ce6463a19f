"""Temporary folders with room: LLVM ends the process where a file that it writes does not fit."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moec.errors import UsageError
from moec.files.os_errors import reason

_FULL = (errno.ENOSPC, errno.EDQUOT)
_MARGIN = 1 << 20  # bytes, for what others write meanwhile


@contextmanager
def temporary_folder(size: int) -> Iterator[Path]:
    """A folder, readable by this user only, with room for files of `size` bytes; gone at the end.

    Raises UsageError where there is no such folder, no room, or the room has gone meanwhile.
    """
    try:
        parent = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise UsageError(f"there is no folder for temporary files: {reason(error)}") from error
    free = shutil.disk_usage(parent).free
    if free < size + _MARGIN:
        raise UsageError(
            f"{parent}, for temporary files, has {free / 1e6:.1f} MB free, and "
            f"{(size + _MARGIN) / 1e6:.1f} MB may be needed: free some, or set TMPDIR to a folder "
            "on another disk"
        )
    try:
        with tempfile.TemporaryDirectory(prefix="moec-") as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno in _FULL:
            raise UsageError(
                f"{parent}, for temporary files, is full: free some space, or set TMPDIR to a "
                "folder on another disk"
            ) from error
        raise
