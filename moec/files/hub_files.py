"""The files of a model of the Hugging Face hub: which are needed, and their download.

Cache, token, server and offline mode are those of huggingface_hub and of its environment variables.
Only configuration, tokenizer and weights are downloaded: no code, and nothing that is pickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import msgspec

from moec.errors import SetupError, UsageError
from moec.files.checkpoint import CONFIG, GENERATION_CONFIG, TOKENIZER_FILES
from moec.files.config_fields import ADAPTER_CONFIG
from moec.files.hub_errors import HubDown, explained
from moec.files.hub_transfer import fetch
from moec.files.regular_file import whole_file
from moec.files.safetensors import INDEX, SINGLE
from moec.spelling import did_you_mean, did_you_mean_file

LOGGER = logging.getLogger(__name__)

_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([^:]+\.gguf))?", re.ASCII)
_OF_FILES = (".gguf", ".moec", ".pt2", ".py")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"(?!\.{1,2}\Z)[^/\\\x00-\x1f]{1,200}")  # of a file or a folder
_SPLIT = re.compile(r"(.*-)00001(-of-(\d{5})\.gguf)")
_MARGIN = 1 << 26  # bytes, for other writers
_MOST_NAMES = 8
_LONGEST_LIST = 1 << 26  # bytes of the names and sizes of a repository, or of an index
_Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{40,64}\Z")]


@dataclass(frozen=True)
class _LargeFile:
    sha256: _Digest


@dataclass(frozen=True)
class _HubFile:
    rfilename: str
    size: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
    blobId: _Digest | None = None
    lfs: _LargeFile | None = None


@dataclass(frozen=True)
class _HubCommit:
    """What moec reads of the hub's answer about a repository, under the hub's names."""

    sha: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{40}\Z")]
    siblings: tuple[_HubFile, ...] = ()


@dataclass(frozen=True)
class HubFiles:
    """The files `names` of a repository at a commit. `missing` has the bytes of each that is not in
    the cache, `blobs` their digests where the hub says them; `gguf` is the file that is the model,
    or empty where the folder is."""

    repository: str
    revision: str
    commit: str
    names: tuple[str, ...]
    missing: Mapping[str, int]
    blobs: Mapping[str, str | None]
    gguf: str = ""

    @property
    def size(self) -> int:
        return sum(self.missing.values())


def is_id(text: str) -> bool:
    """Whether text has the form of an id, ORG/NAME or ORG/NAME:FILE.gguf, and not of a file."""
    match = _ID.fullmatch(text)
    return match is not None and not match[1].endswith(_OF_FILES)


def origin(path: Path) -> tuple[str, str] | None:
    """The repository and the commit of a folder, or of a file in it, of the hub's cache."""
    parts = path.absolute().parts
    for models, snapshots, commit in zip(parts, parts[1:], parts[2:], strict=False):
        if models.startswith("models--") and snapshots == "snapshots" and _COMMIT.fullmatch(commit):
            return models.removeprefix("models--").replace("--", "/"), commit
    return None


def notes(path: Path) -> tuple[str, ...]:
    """What a report says of a model in the hub's cache: its repository and its commit."""
    of_hub = origin(path)
    return (f"{of_hub[0]} of the hub, commit {of_hub[1]}",) if of_hub else ()


def short_name(folder: Path) -> str:
    """The id of a model in the hub's cache; of any other folder the last two names only, because
    artifacts do not record the user's home."""
    of_hub = origin(folder.resolve())
    return of_hub[0] if of_hub else "/".join(folder.resolve().parts[-2:])


def find(text: str, revision: str | None = None) -> HubFiles:
    """The files of the id `text` at a branch, tag or commit. In offline mode, those in the cache,
    and also, with a warning, where the hub is down.

    Raises UsageError where the model cannot be read, has no weights that moec reads, or is not in
    the cache in offline mode.
    """
    match = _ID.fullmatch(text)
    assert match is not None, "the caller checked that it is an id"
    repository, gguf = match[1], match[2] or ""
    for package in ("huggingface_hub", "transformers"):
        if find_spec(package) is None:
            raise SetupError(
                f"{text} does not exist{did_you_mean_file(Path(text))}: to download a model "
                f"of this name, install {package}: pip install 'moec[hf]'"
            )
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        return _of_cache(text, repository, gguf, revision or "main")
    try:
        return _of_hub(text, repository, gguf, revision)
    except HubDown as down:
        try:
            files = _of_cache(text, repository, gguf, revision or "main")
        except UsageError:
            raise down from None
        warnings.warn(
            f"the files of {text} are those of the hub's cache, at {files.commit[:12]}: {down}",
            stacklevel=2,
        )
        return files


def _of_hub(text: str, repository: str, gguf: str, revision: str | None) -> HubFiles:
    with explained(text, revision):
        info = _commit(repository, revision)
        sizes = {file.rfilename: file.size for file in info.siblings}
        blobs = {f.rfilename: f.lfs.sha256 if f.lfs else f.blobId for f in info.siblings}
        files = HubFiles(repository, revision or "main", info.sha, (), sizes, blobs, gguf)
        names = _needed(text, repository, gguf, sizes, lambda: _index(files))
    _check_present(names, sizes, f"{text} has none of this name: give another revision")
    missing = {name: sizes[name] for name in names if not _path(files, name).is_file()}
    return replace(files, names=names, missing=missing)


def _index(files: HubFiles) -> bytes:
    if files.missing[INDEX] > _LONGEST_LIST:
        raise SetupError(f"{INDEX} of {files.repository} is too large: give another revision")
    if not _path(files, INDEX).is_file():
        _download(files, INDEX, _hub("tqdm"))
    return _path(files, INDEX).read_bytes()


def _commit(repository: str, revision: str | None) -> _HubCommit:
    from huggingface_hub import constants

    _hub("validate_repo_id")(repository)
    at = "" if revision is None else f"/revision/{quote(revision, safe='')}"
    url = f"{constants.ENDPOINT}/api/models/{repository}{at}"
    answer = io.BytesIO()
    fetch(f"{url}?blobs=True", answer, _LONGEST_LIST)
    try:
        return msgspec.json.decode(answer.getvalue(), type=_HubCommit)
    except (msgspec.DecodeError, RecursionError) as error:
        raise SetupError(
            f"{url} is no list of files of a model ({error}): choose another server (HF_ENDPOINT)"
        ) from None


def download(files: HubFiles, shares: bool = False) -> Path:
    """The path of a model in the cache, with all its files. With `shares`, what is done is logged,
    for a `Progress`; otherwise huggingface_hub shows its bars.

    Raises UsageError where the disk is too small, the download ends early, or the hub sends
    something else than it announced.
    """
    text = f"{files.repository}:{files.gguf}" if files.gguf else files.repository
    if files.missing:
        _check_room(files)
    bar = _shares(files.size) if shares else _hub("tqdm")
    with explained(text, files.revision, downloads=bool(files.missing)):
        for name in files.missing:
            _download(files, name, bar)
        if not _COMMIT.fullmatch(files.revision):  # where offline mode looks it up
            ref = _folder(files.repository, "refs", *files.revision.split("/"))
            ref.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(ref) as file:
                file.write(files.commit.encode())
    path = _path(files, files.names[0])
    return path if files.gguf else path.parent


def _download(files: HubFiles, name: str, bar: type) -> None:
    """Puts a file into the cache as huggingface_hub does: content below its digest, and a link."""
    from huggingface_hub import hf_hub_url

    size, of_no_digest = files.missing[name], f"{files.commit}/{name}".encode()
    digest = files.blobs[name] or hashlib.sha256(of_no_digest).hexdigest()
    blob = _folder(files.repository, "blobs", digest)
    path = _path(files, name)
    for folder in (blob.parent, path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if not blob.is_file() or blob.stat().st_size != size:
        url = hf_hub_url(files.repository, name, revision=files.commit)
        with whole_file(blob) as file, bar(total=size, desc=name, unit="B", unit_scale=True) as b:
            if not _by_xet(url, Path(file.name), size, name, bar):
                fetch(url, file, size, b)
                file.flush()
            if (sent := Path(file.name).stat().st_size) != size:
                raise SetupError(f"{url} sent {sent:,} of the {size:,} bytes announced")
    path.unlink(missing_ok=True)  # a link to nothing
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:  # a disk without links
        blob.rename(path)


def _by_xet(url: str, path: Path, size: int, name: str, bar: type) -> bool:
    """Whether the file came by Hugging Face's own protocol, without which the hub sends no file
    above 50 GB. Its library counts no bytes, so another server is not asked for it."""
    from huggingface_hub import constants, get_hf_file_metadata
    from huggingface_hub.file_download import xet_get

    official = url.startswith(constants.HUGGINGFACE_CO_URL_HOME)
    if not official or constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
        return False
    data = get_hf_file_metadata(url).xet_file_data
    if data is not None:
        xet_get(
            incomplete_path=path, xet_file_data=data, headers=_hub("build_hf_headers")(),
            expected_size=size, displayed_filename=name, tqdm_class=bar,
        )  # fmt: skip
    return data is not None


def _hub(name: str) -> Any:
    return getattr(import_module("huggingface_hub.utils"), name)  # none has a declaration


def _path(files: HubFiles, name: str) -> Path:
    return _folder(files.repository, "snapshots", files.commit, *name.split("/"))


def _folder(repository: str, *names: str) -> Path:
    """A path in the cache. Raises UsageError where one of the names, which others chose, leads out
    of its folder."""
    from huggingface_hub import constants

    if not all(_NAME.fullmatch(name) for name in names):
        raise SetupError(f"{'/'.join(names)!r:.200} of {repository} is no name of a file")
    return Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", *names)


def _of_cache(text: str, repository: str, gguf: str, revision: str) -> HubFiles:
    first = gguf or CONFIG
    path = _cached(repository, first, revision)
    if path is None:
        near = did_you_mean_file(Path(text))
        raise SetupError(
            f"{text} does not exist here{near}, and the hub's cache does not hold it at {revision}:"
            " HF_HUB_OFFLINE is set, and only without it the model is downloaded"
        )
    folder = path.parents[first.count("/")]
    present = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    names = _needed(text, repository, gguf, present, (folder / INDEX).read_bytes)
    remedy = f"the hub's cache has none for {text}: run the same command without HF_HUB_OFFLINE"
    _check_present(names, present, remedy)
    return HubFiles(repository, revision, folder.name, names, {}, {}, gguf)


def _check_present(names: Collection[str], present: Collection[str], words: str) -> None:
    for name in names:
        if name not in present:
            raise SetupError(f"the file {name} is needed, and {words}")


def _needed(
    text: str, repository: str, gguf: str, present: Collection[str], index: Callable[[], bytes]
) -> tuple[str, ...]:
    """The names of the files to read, the first of which is the model's or its configuration."""
    if gguf:
        if gguf not in present:
            raise SetupError(f"{repository} has no file {gguf}{did_you_mean(gguf, present)}")
        match = _SPLIT.fullmatch(gguf)
        last = int(match[3]) if match else 1
        return (gguf, *(f"{match[1]}{i:05}{match[2]}" for i in range(2, last + 1) if match))
    weights = _weights(repository, present, index)
    if CONFIG not in present or not weights:
        raise SetupError(_without_weights(text, present))
    more = (name for name in (GENERATION_CONFIG, *TOKENIZER_FILES) if name in present)
    return tuple(dict.fromkeys((CONFIG, *more, *weights)))


def _weights(
    repository: str, present: Collection[str], index: Callable[[], bytes]
) -> tuple[str, ...]:
    """The .safetensors that `moec.files.safetensors.weight_files` reads, and their index."""
    if SINGLE in present:
        return (SINGLE,)
    if INDEX in present:
        try:
            names = sorted(set(json.loads(index())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise SetupError(f"{INDEX} of {repository} is damaged: give another revision") from None
        return (INDEX, *(str(name) for name in names))
    others = [n for n in present if n.endswith(".safetensors") and "/" not in n]
    return tuple(others) if len(others) == 1 else ()


def _without_weights(text: str, present: Collection[str]) -> str:
    ggufs = sorted(name for name in present if name.endswith(".gguf"))
    if ggufs:
        more = f" and {len(ggufs) - _MOST_NAMES} others" if len(ggufs) > _MOST_NAMES else ""
        return (
            f"{text} holds GGUF files: name one of them, as in {text}:{ggufs[0]} (it has "
            f"{', '.join(ggufs[:_MOST_NAMES])}{more})"
        )
    if CONFIG not in present and ADAPTER_CONFIG in present:
        return (
            f"{text} is an adapter: give the model that it changes, and the adapter in a folder "
            "with --adapter"
        )
    pickled = next((n for n in sorted(present) if n.endswith((".bin", ".pt", ".pth"))), None)
    if CONFIG in present and pickled is not None:
        return (
            f"{text} has no .safetensors but {pickled}, which is pickled: it could run any code, "
            "so moec does not read it; choose a revision or a copy with safetensors"
        )
    what = CONFIG if CONFIG not in present else ".safetensors"
    return f"{text} is no model that moec can read: the repository has no {what}"


def _cached(repository: str, name: str, revision: str) -> Path | None:
    """The file in the cache, if it is there. No request is sent."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, name, revision=revision)
    return Path(path) if isinstance(path, str) else None


def _check_room(files: HubFiles) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < files.size + _MARGIN:
        raise SetupError(
            f"{files.repository} needs {files.size / 1e9:.1f} GB more in {cache}, and "
            f"{free / 1e9:.1f} GB are free: free some, or set HF_HOME to a folder on another disk"
        )


def _shares(total: int) -> type:
    """A class of progress bars that log how much of all files is done, instead of drawing it."""
    from tqdm.auto import tqdm

    done = 0

    class Shares(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal done
            done += int(n or 0)
            share = min(done / total, 1.0) if total else 1.0
            detail = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
            LOGGER.debug("download %s", detail, extra={"share": share, "detail": detail})
            return None

        # Bytes of the network, which may be compressed; those that are written are counted above.
        def update_transfer(self, n: float | None = 1) -> None: ...

        def set_transfer_postfix_str(self, *args: Any, **kwargs: Any) -> None: ...

    return Shares
