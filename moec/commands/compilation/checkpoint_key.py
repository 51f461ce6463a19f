"""The key of a checkpoint and of the options of its compilation.

It covers the content of the checkpoint's files, the options, the target on this machine, moec's
source, and the versions of the packages that read and compile the model. A large checkpoint takes a
second or two to hash: its key starts with a hash of all else, so that files are hashed before a
compilation only where an artifact with such a start is stored, and otherwise meanwhile.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from glob import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moec.cache import key_of, source_version
from moec.files import hub_files
from moec.files.regular_file import open_regular
from moec.runtime.artifact.part_writers import on_all_cores
from moec.target import cpu

BLOCK_BYTES = 16 << 20
"""Bytes of a file that are hashed together: cores share a large file."""
_DIGITS = 32  # of each of the two hashes
_PACKAGES = (
    *("apache-tvm", "torch", "transformers", "tokenizers", "safetensors"),
    *("numpy", "ml_dtypes", "sympy"),
)


class CheckpointKey:
    """The key of the checkpoint that `files` make, compiled with options whose hash is `start`."""

    def __init__(self, start: str, files: Sequence[Path]) -> None:
        self.start = start[:_DIGITS]
        self._files = files
        self._states = _states(files)
        self._blocks = [
            (path, at)
            for path, state in self._states.items()
            for at in range(0, state[0], BLOCK_BYTES)
        ]
        self._digests: list[Future[str]] = []

    @contextmanager
    def hashing(self) -> Iterator[None]:
        """Hash the files on another core while the block runs; on leaving, stop."""
        pool = ThreadPoolExecutor(1)
        self._digests = [pool.submit(digest_of, block) for block in self._blocks]
        try:
            yield
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def value(self) -> str | None:
        """The key. Waits until all files are hashed; None where one has changed meanwhile."""
        try:
            digests = [digest.result() for digest in self._digests] or on_all_cores(
                digest_of, self._blocks, [BLOCK_BYTES] * len(self._blocks)
            )
            if _states(self._files) != self._states:
                return None
        except (OSError, ValueError):  # a file is shorter, or gone
            return None
        states = self._states.items()  # what a file of GGUF is called makes no difference
        sizes = [("" if path.suffix == ".gguf" else path.name, size) for path, (size, *_) in states]
        return self.start + key_of(sizes, digests)[:_DIGITS]


def checkpoint_key(model: str, options: Mapping[str, object]) -> CheckpointKey | None:
    """The key of a checkpoint's folder or GGUF file and options; None for a model of another kind.
    Of a GGUF model that is split, all files count."""
    path = Path(model)
    if (path / "config.json").is_file():
        files = sorted(file for file in path.iterdir() if file.is_file())
    elif path.suffix == ".gguf" and path.is_file():
        split = re.fullmatch(r"(.+)-\d{5}-of-\d{5}", path.stem)
        files = sorted(path.parent.glob(f"{escape(split[1])}-*.gguf")) if split else [path]
    else:
        return None
    notes = hub_files.notes(path)  # the artifact contains them
    machine = (cpu.host(), cpu.processor())
    versions = [_version(name) for name in _PACKAGES]
    start = key_of(notes, sorted(options.items()), machine, source_version(), versions)
    return CheckpointKey(start, files)


def _states(files: Sequence[Path]) -> dict[Path, tuple[int, int, int]]:
    """The size of each file, and numbers that change where it is written or replaced."""
    states = ((path, path.stat()) for path in files)
    return {path: (s.st_size, s.st_mtime_ns, s.st_ino) for path, s in states}


def digest_of(block: tuple[Path, int]) -> str:
    """The SHA-256 of the block of a file that starts at an offset, in two calls: for each call, a
    thread may wait until Python's main thread makes room for it. The file may become shorter."""
    path, at = block
    with open_regular(path) as file:
        return hashlib.sha256(os.pread(file.fileno(), BLOCK_BYTES, at)).hexdigest()


def _version(name: str) -> str:
    """The version of an installed package; empty for one that is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
