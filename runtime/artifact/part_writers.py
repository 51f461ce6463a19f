"""Writers of the parts of an artifact, into a zip or a folder.

Each part is read once: a block of it is hashed and written while it is in the processor's cache.
Parts are written on all cores, the largest first, each through a file handle of its own; hashing
and writing let other threads run meanwhile. In the zip, the places of members follow from their
sizes, so that they can be written in any order.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

from moec.errors import UsageError
from moec.runtime.process.threads import available

Buffer: TypeAlias = bytes | memoryview
T = TypeVar("T")
R = TypeVar("R")

PAGE = 4096
PART_NAME = re.compile(r"(?!.*(^|/)\.\.?(/|$))[\w.-]+(/[\w.-]+)*", re.ASCII)
_PADDING_ID = 0xD935  # the extra field that Android's zipalign pads with
ZIP64_BYTES = 1 << 30
"""Members of this size or more have sizes of 64 bits; zipfile would begin at twice as many."""
BLOCK_BYTES = 1 << 20
"""Bytes that are hashed and written at once, while they are in the processor's cache."""


class PartWriter(Protocol):
    def add(self, parts: Mapping[str, Buffer]) -> dict[str, str]:
        """Write parts by name; returns the SHA-256 of each, in the order of `parts`.

        Raises UsageError for a name that no part can have, OSError where writing fails.
        """


class FolderWriter:
    """Writes each part as a file of the folder `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def add(self, parts: Mapping[str, Buffer]) -> dict[str, str]:
        for name in parts:
            _check_name(name)
            (self._root / name).parent.mkdir(parents=True, exist_ok=True)

        def write(name: str) -> str:
            with FileIO(self._root / name, "w") as file:
                return write_hashed(file, parts[name])[0]

        names = list(parts)
        sizes = [memoryview(parts[name]).nbytes for name in names]
        return dict(zip(names, on_all_cores(write, names, sizes), strict=True))


class ZipWriter:
    """Writes each part as a stored member of `archive` that starts on a page boundary."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self._archive, self._path = archive, path

    def add(self, parts: Mapping[str, Buffer]) -> dict[str, str]:
        members = [self._place(name, memoryview(content).nbytes) for name, content in parts.items()]

        def write(member: zipfile.ZipInfo) -> str:
            with FileIO(self._path, "r+") as file:
                file.seek(member.header_offset + len(_header(member)))
                digest, member.CRC = write_hashed(file, parts[member.filename])
                file.seek(member.header_offset)
                file.write(_header(member))
            member.extra = b""  # the directory at the end needs no padding
            return digest

        digests = on_all_cores(write, members, [member.file_size for member in members])
        return dict(zip(parts, digests, strict=True))

    def _place(self, name: str, size: int) -> zipfile.ZipInfo:
        """The next member of the archive."""
        _check_name(name)
        archive = self._archive
        member = zipfile.ZipInfo(name)  # dated 1980: the same model gives the same bytes
        member.external_attr = 0o644 << 16
        member.file_size = member.compress_size = size
        member.CRC = 0
        member.header_offset = at = archive.start_dir
        member.extra = struct.pack("<HH", _PADDING_ID, 0)
        padding = -(at + len(_header(member))) % PAGE
        member.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
        archive.start_dir = at + len(_header(member)) + size
        archive.filelist.append(member)
        archive.NameToInfo[name] = member
        return member


def _header(member: zipfile.ZipInfo) -> bytes:
    """The local header of a member."""
    return member.FileHeader(zip64=member.file_size > ZIP64_BYTES)


def on_all_cores(run: Callable[[T], R], items: Sequence[T], sizes: Sequence[int]) -> list[R]:
    """The results of `run` for each item. Those of the greatest size are taken first, so that no
    core is left alone with one of them at the end."""
    order = sorted(range(len(items)), key=lambda i: -sizes[i])
    with ThreadPoolExecutor(available()) as pool:
        results = dict(zip(order, pool.map(lambda i: run(items[i]), order), strict=True))
    return [results[i] for i in range(len(items))]


def write_hashed(file: FileIO, content: Buffer) -> tuple[str, int]:
    """Write all of `content`; returns its SHA-256, and its CRC as a zip has it."""
    view, digest, crc = memoryview(content).cast("B"), hashlib.sha256(), 0
    for start in range(0, view.nbytes, BLOCK_BYTES):
        block = view[start : start + BLOCK_BYTES]
        digest.update(block)
        crc = zlib.crc32(block, crc)
        while block:  # the system may write a part of it
            block = block[file.write(block) :]
    return digest.hexdigest(), crc


def _check_name(name: str) -> None:
    if not PART_NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot name a part of an artifact: use letters, digits . _ - /")
