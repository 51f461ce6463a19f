"""Files of untrusted folders: opened without waiting for a writer, and only where they have an end.

A pipe blocks who opens it, a device is read without end, and a link may lead anywhere.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moec.errors import SetupError

_LONGEST = 1 << 30  # bytes; the longest tokenizers have some 10 MB
_PIECE = 1 << 20  # bytes read at once: a read of n bytes takes n of memory first


def open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """The file at `path`, to read. Raises OSError where it is none, or a folder, pipe or device."""
    waits_not = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    file = open(os.open(path, os.O_RDONLY | waits_not), "rb", buffering=buffering)
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.ENXIO
        raise OSError(number, os.strerror(number), str(path))
    return file


def read_regular(path: Path, most: int = _LONGEST) -> bytes:
    """The bytes of the file at `path`. Raises OSError as `open_regular`, and for over `most`."""
    content = bytearray()
    with open_regular(path) as file:
        while piece := file.read(min(_PIECE, most + 1 - len(content))):
            content += piece
    if len(content) > most:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return bytes(content)


def check_link(path: Path) -> None:
    """Raises UsageError where the file of a model is a link to nothing, or out of its folder, but
    for those of Hugging Face's cache."""
    if path.is_symlink() and not path.exists():
        raise SetupError(f"{path} is a link to nothing, or to itself: copy the file there")
    folder = Path(os.path.realpath(path.parent))
    # blobs of a snapshot, MODEL/snapshots/REVISION, and those that all models of the cache share
    inside = (folder, *(parent / "blobs" for parent in folder.parents[1:3]))
    real = Path(os.path.realpath(path))
    if path.is_symlink() and not any(real.is_relative_to(f) for f in inside):
        raise SetupError(f"{path} leads out of its folder, to {real}: copy the file there")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is renamed to `path` when the block ends without an error.

    It has the permissions of any new file of the user. Raises OSError, which names `path` where its
    folder does not exist.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
