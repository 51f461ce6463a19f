"""Caches artifacts, by checkpoint and options of their compilation.

The key covers the content of the checkpoint's files, the options, the target on this machine,
moec's source, and the versions of the packages that read and compile the model. Factories
(file.py:factory) are compiled each time, because their code may depend on anything.

An artifact that is larger than a fraction of the cache is stored as a frame, without the weights
that follow from the checkpoint's files (see artifact_frame.py). Where a frame is too large as well,
as weights were computed, the model is compiled each time.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from moec.cache import ARTIFACTS, FRAMES, Store, key_of, load, save, source_version
from moec.errors import UsageError
from moec.files.os_errors import reason
from moec.runtime.container import replaceable
from moec.runtime.part_writers import on_all_cores
from moec.target import cpu

if TYPE_CHECKING:
    from moec.commands.compilation.artifact_frame import Frame
    from moec.model.compiled import CompiledModel

_FRACTION = 8
"""An artifact or a frame may take up to one part in this many of the cache."""
_BLOCK = 64 << 20
"""Bytes of a file that are hashed together: cores share a large file."""
_PACKAGES = (
    *("apache-tvm", "torch", "transformers", "tokenizers", "safetensors"),
    *("numpy", "ml_dtypes", "sympy"),
)


def key_for(model: str, options: Mapping[str, object], store: Store) -> str | None:
    """The key of a checkpoint's folder and options; None where it is not cached."""
    folder = Path(model)
    if store.folder is None or not (folder / "config.json").is_file():
        return None
    files = sorted(path for path in folder.iterdir() if path.is_file())
    contents = _digests(files)
    name = folder.resolve().parts[-2:]  # the report and the artifact contain it
    machine = (cpu.host(), cpu.processor())
    return key_of(name, contents, sorted(options.items()), machine, source_version(), _versions())


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
    most = store.limit // _FRACTION
    if not output.is_file():
        return
    if output.stat().st_size <= most:
        save(store, ARTIFACTS, {key: output.read_bytes()})
        return
    from moec.commands.compilation import artifact_frame

    frame = artifact_frame.frame_of(compiled, output, checkpoint)
    if frame is not None and len(frame.content) <= most:
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


def _digests(files: Sequence[Path]) -> list[tuple[str, int, tuple[str, ...]]]:
    """The name and size of each file, and the SHA-256 of each of its blocks."""
    sizes = [path.stat().st_size for path in files]
    blocks = [
        (path, start)
        for path, size in zip(files, sizes, strict=True)
        for start in range(0, size, _BLOCK)
    ]
    digests = iter(on_all_cores(_block_digest, blocks, [_BLOCK] * len(blocks)))
    return [
        (path.name, size, tuple(islice(digests, len(range(0, size, _BLOCK)))))
        for path, size in zip(files, sizes, strict=True)
    ]


def _block_digest(block: tuple[Path, int]) -> str:
    """The SHA-256 of the block of a file that starts at an offset."""
    path, start = block
    digest, left = hashlib.sha256(), _BLOCK
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (content := file.read(min(left, 1 << 20))):
            digest.update(content)
            left -= len(content)
    return digest.hexdigest()


def _versions() -> list[str]:
    return [_version(name) for name in _PACKAGES]


def _version(name: str) -> str:
    """The version of an installed package; empty for one that is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
