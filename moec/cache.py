"""The cache on disk: one folder of entries with keys, accessible to its owner only.

    $MOEC_CACHE, or moec in the user's cache folder; "off" disables it
      objects/KEY     native code of one kernel
      libraries/KEY   native code of one block
      artifacts/KEY   the artifact of one checkpoint, by `moec compile`
      models/NAME.moec  the artifact of a model that a command ran; no limit evicts it
      runs/KEY        how long the phases of the last compilations took, as JSON

Threat model: all entries but runs are native code that moec links and runs, and a hash
in the same file does not stop anybody who can write there. So the folder is trusted only because it
is the user's: nothing is read from a folder or entry that belongs to another user or that others
may write. The hash detects damage: an entry that is truncated, changed or misnamed counts as
missing.

If the cache cannot be used, everything is compiled, with one CacheWarning.
"""

from __future__ import annotations

import atexit
import getpass
import hashlib
import math
import os
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import platformdirs

from moec.errors import SetupError, UsageError
from moec.files.os_errors import reason

OBJECTS, LIBRARIES, RUNS = "objects", "libraries", "runs"
ARTIFACTS, MODELS = "artifacts", "models"
KINDS = (OBJECTS, LIBRARIES, ARTIFACTS, RUNS)
DEFAULT_LIMIT = 2 * 2**30  # bytes
LARGE = 1 << 10  # a payload above this part of the limit is large

_MAGIC = b"moec cache 1\n"
_HEADER = len(_MAGIC) + hashlib.sha256().digest_size
PARTIAL = ".partial-"
_INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
ABANDONED = 3600.0  # seconds after which a partial file is assumed to have no writer


class CacheWarning(UserWarning):
    """The cache cannot be used, so everything is compiled."""


@dataclass(frozen=True)
class Store:
    """Entries in `folder`, at most `limit` bytes in all; without a folder, nothing is stored."""

    folder: Path | None
    limit: int = DEFAULT_LIMIT


@dataclass(frozen=True)
class Entry:
    """One file of a store: its size in bytes, and when it was last used, in seconds."""

    path: Path
    kind: str
    size: int
    used: float


@cache
def source_version() -> str:
    """The SHA-256 of moec's source, for the keys of entries that depend on all of it."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for folder, _, names in sorted(os.walk(root, followlinks=True)):
        for name in sorted(names):
            if name.endswith((".py", ".c")):
                path = Path(folder, name)
                digest.update(f"{path.relative_to(root)}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def key_of(*parts: object) -> str:
    """The SHA-256 of the `parts` that an entry depends on, as hexadecimal text."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = str(part).encode(errors="surrogatepass")
        digest.update(b"%d:" % len(encoded))
        digest.update(encoded)
    return digest.hexdigest()


# ---- which folder ----------------------------------------------------------------------


def default_folder() -> Path | None:
    """$MOEC_CACHE (None if it is "off"), or moec's folder in the system's folder for caches."""
    name = os.environ.get("MOEC_CACHE")
    if name == "off":
        return None
    return Path(name) if name else platformdirs.user_cache_path("moec", appauthor=False)


def limit() -> int:
    """The limit of the folder in bytes: $MOEC_CACHE_SIZE, in GiB, or 2 GiB.

    Raises UsageError for anything but a positive number.
    """
    text = os.environ.get("MOEC_CACHE_SIZE") or "2"
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < math.inf:
        raise UsageError(f"MOEC_CACHE_SIZE is {text!r}: give a number of GiB, such as 0.5 or 4")
    return int(size * 2**30)


def default_store() -> Store:
    """The user's store."""
    return store_in(default_folder())


def store_in(folder: Path | None) -> Store:
    """The store in a folder, which is created if it is missing. If the folder or $MOEC_CACHE_SIZE
    cannot be used: a disabled store, and a CacheWarning."""
    if folder is None:
        return Store(None)
    try:
        size = limit()
        _make(folder)
    except (UsageError, OSError) as error:
        _warn(folder, _reason(error))
        return Store(None)
    return Store(folder, size)


def _make(folder: Path) -> None:
    """Create the folder. Raises OSError where that fails, UsageError where others may write it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _private(folder.stat()) or (open_to := others_may_change(folder)) == folder:
        raise SetupError(
            "other users can write to it, and its files are run as native code: make it yours "
            "with chmod 700, or set MOEC_CACHE to another folder"
        )
    if open_to is not None:
        raise SetupError(
            f"other users can write to {open_to} and replace it, and its files are run as native "
            "code: set MOEC_CACHE to another folder"
        )


def set_inductor_folder() -> None:
    """Gives torch's Inductor, which runs the code in its folder, another one where others may write
    to that: by default it is torchinductor_USER, which any user can make in /tmp before."""
    try:
        name = os.environ.get(_INDUCTOR) or f"torchinductor_{getpass.getuser()}"
        folder = Path(tempfile.gettempdir(), name)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        private = others_may_change(folder) is None
    except (OSError, KeyError):  # the user has no name
        private = False
    if not private:
        folder = Path(tempfile.mkdtemp(prefix="moec-inductor-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[_INDUCTOR] = str(folder)


def _private(state: os.stat_result) -> bool:
    """Whether it belongs to the user, and nobody else may write to it."""
    if not hasattr(os, "geteuid"):
        return True
    return state.st_uid == os.geteuid() and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _reason(error: Exception) -> str:
    return reason(error) if isinstance(error, OSError) else str(error)


@cache
def _warn(folder: Path, reason: str) -> None:
    """Warn once per process for each folder and reason."""
    warnings.warn(
        f"the cache {folder} is not used: {reason}. All kernels are compiled again",
        CacheWarning,
        stacklevel=2,
    )


# ---- entries ---------------------------------------------------------------------------


def load(store: Store, kind: str, key: str) -> bytes | None:
    """The payload that was saved under a key; None if it is missing or damaged."""
    if store.folder is None:
        return None
    path = store.folder / kind / key
    try:
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with open(os.open(path, flags), "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode) or not _private(state):
                return None
            content = file.read()
    except OSError:
        return None
    payload = content[_HEADER:]
    if content[:_HEADER] != _header(kind, key, payload):
        return None
    with suppress(OSError):
        os.utime(path)  # used last
    return payload


def contains(store: Store, kind: str, key: str) -> bool:
    """Whether an entry exists under a key; it may still be damaged."""
    return store.folder is not None and (store.folder / kind / key).is_file()


def starts_with(store: Store, kind: str, start: str) -> bool:
    """Whether there is an entry whose key starts with `start`, which has no special characters."""
    return store.folder is not None and any((store.folder / kind).glob(f"{start}*"))


def save(store: Store, kind: str, payloads: Mapping[str, bytes]) -> None:
    """Store entries by their keys, then evict the least recently used ones beyond the limit.

    To look for those takes 10 ms for a thousand entries, so small payloads start it in one of 16
    cases, by their hash. Readers and other writers of the same keys see an old or a new entry,
    never a partial one. If nothing can be written, there is a CacheWarning.
    """
    if store.folder is None or not payloads:
        return
    folder = store.folder / kind
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        headers = {key: _header(kind, key, payload) for key, payload in payloads.items()}
        for key, payload in payloads.items():
            _write(folder / key, headers[key], payload)
        large = max(map(len, payloads.values())) > store.limit // LARGE
        if large or any(header[-1] % 16 == 0 for header in headers.values()):
            _trim(store, {folder / key for key in payloads})
    except OSError as error:
        _warn(store.folder, f"it is not writable ({_reason(error)})")


def entries(store: Store, kinds: Sequence[str] = (*KINDS, MODELS)) -> Iterator[Entry]:
    """The entries of these kinds. Other processes may add and remove entries meanwhile."""
    if store.folder is None:
        return
    for kind in kinds:
        with (
            suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(store.folder / kind) as files,
        ):
            for file in files:
                with suppress(FileNotFoundError):
                    state = file.stat(follow_symlinks=False)
                    yield Entry(Path(file.path), kind, state.st_size, state.st_mtime)


def clear(store: Store) -> int:
    """Remove every entry and all files of interrupted writers. Returns the number of files.

    Raises OSError where a file cannot be removed.
    """
    present = [*entries(store)]
    for entry in present:
        entry.path.unlink(missing_ok=True)
    return len(present)


def _header(kind: str, key: str, payload: bytes) -> bytes:
    """The header of a payload: its hash, which includes its name."""
    digest = hashlib.sha256(f"{kind}/{key}\n".encode())
    digest.update(payload)
    return _MAGIC + digest.digest()


def _write(path: Path, *parts: bytes) -> None:
    # accessible to this user only
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL)
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _trim(store: Store, newest: set[Path]) -> None:
    """Evict least recently used entries until at most `limit` bytes are left; the `newest` entries
    stay, whatever their size."""
    now = time.time()
    present = []
    for entry in entries(store, KINDS):
        if not entry.path.name.startswith(PARTIAL):
            present.append(entry)
        elif now - entry.used > ABANDONED:
            entry.path.unlink(missing_ok=True)
    total = sum(entry.size for entry in present)
    for entry in sorted(present, key=lambda entry: (entry.used, entry.path)):
        if total <= store.limit:
            return
        if entry.path not in newest:
            entry.path.unlink(missing_ok=True)
            total -= entry.size


def others_may_change(path: Path) -> Path | None:
    """The folder, `path` or one that it is in, whose content other users may replace; None where
    only the user and root may. A group with the number of its user has nobody else in it."""
    if not hasattr(os, "geteuid"):
        return None
    trusted = (0, os.geteuid())
    paths = {Path(form) for form in (os.path.abspath(path), os.path.realpath(path))}
    for folder in sorted({folder for p in paths for folder in (p, *p.parents)}):
        state = folder.stat()
        alone = state.st_gid == state.st_uid
        writable = state.st_mode & (stat.S_IWOTH | (0 if alone else stat.S_IWGRP))
        sticky = state.st_mode & stat.S_ISVTX and folder not in paths  # what is in it stays its own
        owners = {state.st_uid, folder.lstat().st_uid}
        if not owners <= {*trusted} or (writable and not sticky):
            return folder
    return None
