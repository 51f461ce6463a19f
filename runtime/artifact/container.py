"""A named set of byte strings on disk: a zip whose members can be mapped, or a folder.

In the zip, members are stored, not compressed, and each starts on a page boundary. A part is mapped
when it is read; nothing is copied and nothing is extracted by name. Mappings are private: writing
to a weight does not change the file. Writing to the file may change a mapping, so a caller compares
the states of the open `files` before each run.

Both forms are written beside their destination and renamed when complete; a failure leaves the old
artifact. (A file is replaced atomically; replacing a folder leaves a short gap.)
"""

from __future__ import annotations

import glob
import os
import platform
import re
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from moec.errors import ArtifactError, SetupError
from moec.files.os_errors import reason
from moec.files.regular_file import open_regular
from moec.files.whole_folder import swap
from moec.runtime.artifact.open_file import FilePart, OpenFile, check_copy
from moec.runtime.artifact.part_writers import PART_NAME, FolderWriter, PartWriter, ZipWriter
from moec.spelling import did_you_mean_file

_LOCAL_HEADER = struct.Struct("<4s22xHH")


class Container(Mapping[str, memoryview]):
    """The parts by name, not yet verified, of the artifact at `path`. `file_parts` are where they
    are; with `copy` they are read into memory at once."""

    def __init__(
        self, path: Path, file_parts: Mapping[str, FilePart], *, copy: bool = False
    ) -> None:
        self.file_parts, self._copy = file_parts, copy
        self._contents: dict[str, memoryview] = {}
        if copy:
            check_copy(path, sum(file_part.size for file_part in file_parts.values()))
            self._contents = {name: file_part.copied() for name, file_part in file_parts.items()}

    def files(self, names: Iterable[str]) -> tuple[OpenFile, ...]:
        """The files that the parts are mapped from: none where they were copied into memory."""
        files = {} if self._copy else {self.file_parts[name].file: None for name in names}
        return tuple(files)

    def __getitem__(self, name: str) -> memoryview:
        if name not in self._contents:
            self._contents[name] = self.file_parts[name].mapped()
        return self._contents[name]

    def held(self, name: str) -> memoryview:
        """A part, from now on in memory: a mapped one ends the process where the file is cut."""
        if not self._copy:
            self._contents[name] = self.file_parts[name].copied()
        return self._contents[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_parts)

    def __len__(self) -> int:
        return len(self.file_parts)


def open_container(path: Path, *, copy: bool = False) -> Container:
    """The parts of the artifact at `path`, mapped or, with `copy`, read into memory.

    Raises ArtifactError where it is missing, truncated, not of the form that moec writes, or larger
    than the memory that is to hold it.
    """
    if "\0" in str(path):
        raise ArtifactError(f"{str(path)!r} contains a zero byte, which no file name may")
    if path.is_dir():
        return Container(path, _Folder(path), copy=copy)
    if not path.exists():
        raise ArtifactError(f"{path}: there is no such file{did_you_mean_file(path)}")
    if not path.is_file():
        raise ArtifactError(f"{path} is not a regular file")
    try:
        file = OpenFile(path)
        spans = part_spans(path, file.read)
        file_parts = {n: FilePart(file, s.start, s.stop - s.start) for n, s in spans.items()}
        return Container(path, file_parts, copy=copy)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {reason(error)}") from error


class _Folder(Mapping[str, FilePart]):
    """A folder whose files are opened on access. A name cannot refer to a path outside of it."""

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.realpath(root))
        self._opened: dict[str, FilePart] = {}

    def __getitem__(self, name: str) -> FilePart:
        path = self._root / name
        links = os.path.realpath(path) != str(path)
        if links or not PART_NAME.fullmatch(name) or not path.is_file():
            raise KeyError(name)
        if name not in self._opened:
            file = OpenFile(path)
            self._opened[name] = FilePart(file, 0, file.state.size)
        return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        for path in sorted(self._root.rglob("*")):
            if path.is_symlink() or not path.is_dir():
                yield path.relative_to(self._root).as_posix()

    def __len__(self) -> int:
        return sum(1 for _ in self)


Read = Callable[[int, int], bytes | memoryview]
"""(start, size) -> bytes of a file, fewer at its end."""


def part_spans(path: Path, read: Read) -> dict[str, slice]:
    """The file_parts of the parts in the file at `path`, by name.

    Raises ArtifactError where it is truncated, or not of the form that moec writes.
    """
    if bytes(read(0, 2)) != b"PK":
        raise ArtifactError(f"{path} is not a moec artifact; `moec compile -o` makes one")
    try:
        with zipfile.ZipFile(path) as archive:
            members, directory = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, EOFError) as error:
        raise ArtifactError(
            f"{path} is truncated or damaged: {_sentence(error)}; compile or copy it again"
        ) from error

    spans: dict[str, slice] = {}
    end, gaps = 0, 0
    for member in sorted(members, key=lambda m: m.header_offset):
        name = member.filename
        folder = name.endswith("/") and member.file_size == 0
        if not PART_NAME.fullmatch(name.removesuffix("/") if folder else name):
            raise ArtifactError(f"{path}: {name!r} is not a valid name of a part")
        if name in spans:
            raise ArtifactError(f"{path} holds {name!r} twice, so it is not an artifact of moec")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ArtifactError(
                f"{path}: {name!r} is compressed or encrypted, so it cannot be mapped; "
                "unpack the file and run the folder"
            )
        start = _start(read, member, directory)
        if start is None or member.header_offset < end:
            raise ArtifactError(f"{path}: {name!r} is not where the zip directory says")
        gaps += member.header_offset - end
        end = start + member.file_size
        if not folder:
            spans[name] = slice(start, end)
    if gaps or end != directory or not _ends(read, members, directory):
        raise ArtifactError(f"{path} has bytes that belong to no part: compile or copy it again")
    return spans


def _ends(read: Read, members: Iterable[zipfile.ZipInfo], directory: int) -> bool:
    """Whether the file ends with its directory, without comments."""
    entries = sum(46 + len(m.filename.encode()) + len(m.extra) for m in members)
    records = bytes(read(directory + entries, 100))
    # the last one, perhaps after two for sizes of 64 bits
    return len(records) in (22, 98) and records[-22:-18] == b"PK\5\6" and records[-2:] == b"\0\0"


def _start(read: Read, member: zipfile.ZipInfo, directory: int) -> int | None:
    """The offset of a member's bytes; None if its local header contradicts the directory."""
    at = member.header_offset
    if not 0 <= at <= directory - _LOCAL_HEADER.size:
        return None
    header = read(at, _LOCAL_HEADER.size + len(member.filename.encode()))
    magic, name_size, extra_size = _LOCAL_HEADER.unpack_from(header)
    start: int = at + _LOCAL_HEADER.size + name_size + extra_size
    if magic != b"PK\3\4" or header[_LOCAL_HEADER.size :] != member.filename.encode():
        return None
    if name_size != len(header) - _LOCAL_HEADER.size:
        return None
    fits = member.file_size == member.compress_size and start + member.file_size <= directory
    return start if fits else None


def _sentence(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text[0].lower() + text[1:]


@contextmanager
def replacing(path: Path, *, folder: bool, overwrite: bool = True) -> Iterator[PartWriter]:
    """Replace the artifact at `path`: it is renamed into place when the block ends without an
    error. Temporary files of killed writers are removed.

    Raises UsageError where `path` is not an artifact, exists without `overwrite` (also if another
    process has written it meanwhile), or cannot be written.
    """
    if path.exists() and not replaceable(path):
        raise SetupError(f"{path} exists and is not a moec artifact; remove it or write elsewhere")
    _remove_stale(path)
    try:
        temporary = Path(
            tempfile.mkdtemp(prefix=f"{writer_prefix(path)}{os.getpid()}.", dir=path.parent)
        )
    except OSError as error:
        raise SetupError(f"{path} cannot be written: {reason(error)}") from error
    try:
        new = temporary / "new"
        if folder:
            new.mkdir()
            yield FolderWriter(new)
        else:
            with zipfile.ZipFile(new, "w") as archive:
                yield ZipWriter(archive, new)
        if not overwrite and path.exists():
            raise SetupError(
                f"{path} was written by another process meanwhile, and is left as it is"
            )
        if path.is_dir() or folder:
            swap(new, path, temporary / "old")
        else:
            new.rename(path)
    except OSError as error:
        raise SetupError(f"{path} cannot be written: {reason(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def writer_prefix(path: Path) -> str:
    """The prefix of temporary folders of writers on this machine; the process id follows."""
    host = re.sub(r"[^\w-]", "-", platform.node())
    return f".{path.name}.{host}."


def _remove_stale(path: Path) -> None:
    """Remove the temporary folders of writers of `path` whose processes have ended."""
    start = writer_prefix(path)
    for folder in path.parent.glob(f"{glob.escape(start)}*"):
        process = folder.name.removeprefix(start).partition(".")[0]
        if process.isdecimal() and not _runs(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def replaceable(path: Path) -> bool:
    """Whether writing an artifact may replace what is at `path`."""
    if path.is_dir():
        return (path / "manifest.json").is_file() or not any(path.iterdir())
    if not path.is_file():
        return False
    if path.suffix == ".moec":  # a damaged one too
        return True
    with open_regular(path) as file:
        if file.read(2) != b"PK":
            return os.fstat(file.fileno()).st_size == 0
    try:
        with zipfile.ZipFile(path) as archive:
            return "manifest.json" in archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        return False
