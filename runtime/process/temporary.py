"""Temporary folders with enough room: LLVM ends the process if a file does not fit on the disk."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moec.errors import SetupError
from moec.files.os_errors import reason

_FULL = (errno.ENOSPC, errno.EDQUOT)
_MARGIN = 1 << 20  # bytes, for other writers


@contextmanager
def temporary_folder(size: int) -> Iterator[Path]:
    """A folder for this user only, with room for files of `size` bytes; removed on leaving.

    Raises UsageError where there is no folder for temporary files, no room, or no room any more.
    """
    try:
        parent = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise SetupError(f"there is no folder for temporary files: {reason(error)}") from error
    free = shutil.disk_usage(parent).free
    if free < size + _MARGIN:
        raise SetupError(
            f"{parent}, for temporary files, has {free / 1e6:.1f} MB free, and "
            f"{(size + _MARGIN) / 1e6:.1f} MB may be needed: free some, or set TMPDIR to a folder "
            "on another disk"
        )
    try:
        with tempfile.TemporaryDirectory(prefix="moec-") as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno in _FULL:
            raise SetupError(
                f"{parent}, for temporary files, is full: free some space, or set TMPDIR to a "
                "folder on another disk"
            ) from error
        raise
