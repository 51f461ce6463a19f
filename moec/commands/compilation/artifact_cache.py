"""Caches artifacts, by checkpoint and options of their compilation.

The key covers the content of the checkpoint's files, the options, the target on this machine,
moec's source, and the versions of the packages that read and compile the model. Factories
(file.py:factory) are compiled each time, because their code may depend on anything; so are
checkpoints and artifacts that are larger than a fraction of the cache.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moec.cache import ARTIFACTS, Store, key_of, load, save, source_version
from moec.errors import UsageError
from moec.files.os_errors import reason
from moec.runtime.container import replaceable
from moec.target import cpu

_FRACTION = 8
"""A checkpoint or an artifact may take up to one part in this many of the cache."""
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
    if sum(path.stat().st_size for path in files) > store.limit // _FRACTION:
        return None
    contents = [(path.name, _digest(path)) for path in files]
    name = folder.resolve().parts[-2:]  # the report and the artifact contain it
    machine = (cpu.host(), cpu.processor())
    return key_of(name, contents, sorted(options.items()), machine, source_version(), _versions())


def fetch(store: Store, key: str, output: Path, *, overwrite: bool = False) -> bool:
    """Write the cached artifact of a key to the file `output`; returns whether that was done.

    It is not done where nothing is cached, or where `output` exists and must not be replaced.
    Raises UsageError where `output` cannot be written.
    """
    if output.exists() and (not overwrite or output.is_dir() or not replaceable(output)):
        return False
    content = load(store, ARTIFACTS, key)
    if content is None:
        return False
    try:
        with tempfile.TemporaryDirectory(prefix=".moec-", dir=output.parent) as folder:
            path = Path(folder) / output.name
            path.write_bytes(content)
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


def keep(store: Store, key: str, output: Path) -> None:
    """Cache the artifact in `output`, unless it is too large."""
    if output.is_file() and output.stat().st_size <= store.limit // _FRACTION:
        save(store, ARTIFACTS, {key: output.read_bytes()})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> list[str]:
    return [_version(name) for name in _PACKAGES]


def _version(name: str) -> str:
    """The version of an installed package; empty for one that is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
