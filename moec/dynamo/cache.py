"""Compiled blocks on disk: an artifact without weights for each key.

The key is the SHA-256 of all that the code depends on: the region's graph with its types, the
passes, the target and the versions. Reading an entry checks the hashes of its parts, as for
every artifact; a damaged or foreign one is compiled anew and replaced. The folder is for its
owner alone, since entries are native code. When it has grown beyond $MOEC_CACHE_SIZE, those
entries go that were not used for longest.
"""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from moec import cache_folder
from moec.errors import ArtifactError, UsageError
from moec.runtime import artifact
from moec.runtime.package import MAIN, Package


def limit() -> int:
    """The bytes that the folder may hold: $MOEC_CACHE_SIZE, in GiB, or 2 GiB.

    Raises UsageError for what is no positive number.
    """
    given = os.environ.get("MOEC_CACHE_SIZE") or "2"
    try:
        size = float(given)
    except ValueError:
        size = 0.0
    if not 0 < size < math.inf:
        raise UsageError(f"MOEC_CACHE_SIZE is {given!r}: give GiB, a number such as 0.5 or 4")
    return int(size * 2**30)


def load(folder: Path | None, key: str) -> Package | None:
    """The package kept under a key, without arrays; None where there is none that can be used."""
    if folder is None:
        return None
    path = folder / f"{key}.moec"
    if not path.is_file() or not cache_folder.private(path):
        return None
    try:
        found = artifact.read(path)
    except ArtifactError:
        return None
    if found.manifest.extra.get("key") != key:
        return None
    package = found.package
    with suppress(OSError):
        os.utime(path)  # used last
    count = int(found.manifest.extra["inputs"])
    main = package.main
    main = replace(main, inputs=main.inputs[:count], params=main.inputs[count:])
    return replace(package, functions={MAIN: main})


def store(folder: Path | None, key: str, package: Package, graph_text: str) -> None:
    """Keep a package under a key; its weights are the model's, and stay there.

    Raises UsageError where the folder cannot be written, is not the user's alone, or has a limit
    that is no size.
    """
    if folder is None:
        return
    most = limit()
    cache_folder.make(
        folder,
        'and entries are native code: chmod 700 it, or name another with options={"cache": ...}',
    )
    # Weights are arguments, as inputs are: an artifact need not hold them.
    main = package.main
    bare = replace(main, inputs=(*main.inputs, *main.params), params=())
    package = replace(package, functions={MAIN: bare}, arrays={})
    extra = {"key": key, "inputs": len(main.inputs)}
    path = folder / f"{key}.moec"
    artifact.write(package, path, graphs={MAIN: graph_text}, extra=extra)
    path.chmod(0o600)
    _shrink(folder, most, path)


def _shrink(folder: Path, most: int, newest: Path) -> None:
    """Remove entries, the one unused for longest first, until at most `most` bytes are left; the
    newest stays whatever its size. Other processes may remove them as well."""
    found: list[tuple[float, int, Path]] = []
    for path in folder.glob("*.moec"):
        with suppress(FileNotFoundError):
            state = path.stat()
            found.append((state.st_mtime, state.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most:
            return
        if path != newest:
            path.unlink(missing_ok=True)
            total -= size
