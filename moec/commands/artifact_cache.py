"""Artifacts that were compiled before, from the same checkpoint in the same way.

The key is the content of the checkpoint's files, the options, the target as this machine
describes it, moec's source and the versions of what reads and compiles the model. Python that
makes a model (file.py:factory) may read anything, so that nothing stands for it, and it is
compiled each time; so is what is larger than a fraction of the cache.
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
"""An artifact, or a checkpoint, may be as large as this part of the cache."""
_PACKAGES = (
    *("apache-tvm", "torch", "transformers", "tokenizers", "safetensors"),
    *("numpy", "ml_dtypes", "sympy"),
)


def key_for(model: str, options: Mapping[str, object], store: Store) -> str | None:
    """The key of what a checkpoint's folder compiles to; None where it has none."""
    folder = Path(model)
    if store.folder is None or not (folder / "config.json").is_file():
        return None
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if sum(path.stat().st_size for path in files) > store.limit // _FRACTION:
        return None
    contents = [(path.name, _digest(path)) for path in files]
    name = folder.resolve().parts[-2:]  # the report and the artifact tell it
    machine = (cpu.host(), cpu.processor())
    return key_of(name, contents, sorted(options.items()), machine, source_version(), _versions())


def fetch(store: Store, key: str, output: Path, *, overwrite: bool = False) -> bool:
    """Write the artifact that was kept under a key to the file `output`; whether that was done.

    It is not where nothing was kept, and where something is lost that `overwrite` does not mean.
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
                os.link(path, output)  # which another process may have written meanwhile
            except OSError:
                return False
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {reason(error)}") from error
    return True


def keep(store: Store, key: str, output: Path) -> None:
    """Keep the artifact in `output`, unless it is too large."""
    if output.is_file() and output.stat().st_size <= store.limit // _FRACTION:
        save(store, ARTIFACTS, {key: output.read_bytes()})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> list[str]:
    return [_version(name) for name in _PACKAGES]


def _version(name: str) -> str:
    """Of an installed package; empty for one that is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
