"""Cache entries that outlive a process: intact or absent, private, bounded; never a failure."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

from moec import cache
from moec.cache import (
    LIBRARIES,
    OBJECTS,
    CacheWarning,
    Store,
    clear,
    default_folder,
    default_store,
    entries,
    key_of,
    load,
    save,
    store_in,
)
from moec.files.os_errors import reason
from tests.fresh import Warm, moec_command

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_in(tmp_path / "cache")


def path_of(store: Store, key: str) -> Path:
    assert store.folder is not None
    return store.folder / OBJECTS / key


def test_what_was_saved_is_loaded(store: Store) -> None:
    assert load(store, OBJECTS, "a") is None
    save(store, OBJECTS, {"a": b"one", "empty": b""})
    assert load(store, OBJECTS, "a") == b"one"
    assert load(store, OBJECTS, "empty") == b""
    assert load(store, LIBRARIES, "a") is None
    save(store, OBJECTS, {"a": b"two"})
    assert load(store, OBJECTS, "a") == b"two"


def test_only_the_owner_can_read_it(store: Store) -> None:
    save(store, OBJECTS, {"a": b"one"})
    assert store.folder is not None
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path_of(store, "a").stat().st_mode) == 0o600


def test_every_cut_and_every_changed_byte_is_noticed(store: Store) -> None:
    save(store, OBJECTS, {"a": b"some native code"})
    path = path_of(store, "a")
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at])
        assert load(store, OBJECTS, "a") is None
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        assert load(store, OBJECTS, "a") is None
    path.write_bytes(content + b"\0")
    assert load(store, OBJECTS, "a") is None
    path.write_bytes(content)
    assert load(store, OBJECTS, "a") == b"some native code"


def test_an_entry_under_another_name_is_none(store: Store) -> None:
    save(store, OBJECTS, {"a": b"one"})
    path_of(store, "a").rename(path_of(store, "b"))
    assert load(store, OBJECTS, "b") is None


@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "writable"])
def test_what_is_no_private_file_is_not_read(store: Store, tmp_path: Path, kind: str) -> None:
    save(store, OBJECTS, {"a": b"one"})
    path = path_of(store, "a")
    if kind == "writable":
        path.chmod(0o622)
    else:
        path.rename(tmp_path / "elsewhere")
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(tmp_path / "elsewhere")
        else:
            os.mkfifo(path)
    assert load(store, OBJECTS, "a") is None


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@as_root
@pytest.mark.parametrize("between", ["", "a", "a/b"])
@pytest.mark.parametrize("mode", [0o777, 0o757, 0o775])
def test_a_folder_above_that_others_may_write(tmp_path: Path, mode: int, between: str) -> None:
    """They may put another folder in its place."""
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chown(shared, -1, 12345)
    shared.chmod(mode)
    words = f"other users can write to {shared} and replace it, and its files are run as native"
    with pytest.warns(CacheWarning, match=re.escape(words)):
        assert store_in(shared / between / "cache").folder is None


@pytest.mark.parametrize("mode", [0o1777, 0o755, 0o700])
def test_a_folder_above_in_which_others_may_replace_nothing(tmp_path: Path, mode: int) -> None:
    (shared := tmp_path / "shared").mkdir()
    shared.chmod(mode)
    assert store_in(shared / "cache").folder is not None


def test_a_link_that_others_may_switch(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/link").symlink_to(tmp_path / "own")
    (tmp_path / "shared").chmod(0o777)
    with pytest.warns(CacheWarning, match="shared and replace it"):
        assert store_in(tmp_path / "shared/link").folder is None


@as_root
@pytest.mark.parametrize("kind", ["foreign", "writable", "below", "link", "private", "new"])
def test_the_folder_of_inductor(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its maker may put code into it."""
    folder = tmp_path / "shared/torchinductor_me"
    monkeypatch.setenv("LOGNAME", "me")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777 if kind == "below" else 0o1777)
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere").chmod(0o777)
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind != "new":
        folder.mkdir(mode=0o755)
        folder.chmod(0o757 if kind == "writable" else 0o755)
        os.chown(folder, 12345 if kind == "foreign" else -1, -1)
    cache.set_inductor_folder()
    chosen = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert (chosen == folder) is (kind in ("private", "new"))
    assert stat.S_IMODE(chosen.stat().st_mode) == (0o755 if kind == "private" else 0o700)
    assert chosen.stat().st_uid == os.geteuid()


def test_what_was_not_used_for_longest_goes_first(store: Store) -> None:
    small = Store(store.folder, limit=5 * 145)
    for age, key in enumerate("fedcba"[1:]):
        save(small, OBJECTS, {key: bytes(100)})
        os.utime(path_of(small, key), (1000 + age, 1000 + age))
    assert load(small, OBJECTS, "e") is not None  # the oldest, used just now
    save(small, LIBRARIES, {"new": bytes(100)})
    names = {entry.path.name for entry in entries(small)}
    assert names == {"e", "c", "b", "a", "new"}
    save(small, LIBRARIES, {"large": bytes(10_000)})
    assert [entry.path.name for entry in entries(small)] == ["large"]


def test_small_entries_seldom_start_a_search(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in 16 on average; a large one always does."""
    searches: list[Store] = []
    monkeypatch.setattr(cache, "entries", lambda store, *_: searches.append(store) or ())
    large = Store(store.folder, limit=1 << 20)
    for number in range(256):
        save(large, OBJECTS, {key_of(number): bytes(1024)})
    assert 8 <= len(searches) <= 24
    searches.clear()
    for number in range(3):
        save(large, OBJECTS, {key_of(number): bytes(1025)})
    assert len(searches) == 3


def test_what_an_interrupted_writer_left_goes(store: Store) -> None:
    save(store, OBJECTS, {"a": b"one"})
    for name, age in (("old", 2 * cache.ABANDONED), ("new", 0.0)):
        left = path_of(store, cache.PARTIAL + name)
        left.write_bytes(b"half")
        os.utime(left, (left.stat().st_mtime - age,) * 2)
    save(Store(store.folder, limit=1000), OBJECTS, {"b": b"two"})
    assert {entry.path.name for entry in entries(store)} == {"a", "b", cache.PARTIAL + "new"}
    assert clear(store) == 3
    assert not list(entries(store))


WRITER = """
import sys
from pathlib import Path
from moec.cache import OBJECTS, load, save, store_in
store = store_in(Path(sys.argv[1]))
for turn in range(300):
    payload = bytes([turn % 251]) * 5000
    save(store, OBJECTS, {"shared": payload, f"{sys.argv[2]}{turn % 7}": payload})
    found = load(store, OBJECTS, "shared")
    assert found is not None and found == found[:1] * 5000
"""


def test_processes_write_the_same_entries_at_once(tmp_path: Path) -> None:
    """Each finds the one entry or the other, never a part; the folder is too small for all."""
    environment = {**os.environ, "MOEC_CACHE_SIZE": str(40_000 / 2**30)}
    command = [sys.executable, "-W", "error", "-c", WRITER, str(tmp_path / "cache")]
    started = [
        subprocess.Popen([*command, name], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        for name in ("a", "b")
    ]
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()


# ---- folders that cannot be used -------------------------------------------------------


def test_off_and_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEC_CACHE", "off")
    assert default_folder() is None
    save(default_store(), OBJECTS, {"a": b"one"})
    assert load(default_store(), OBJECTS, "a") is None
    monkeypatch.setenv("MOEC_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert sys.platform != "linux" or default_folder() == Path("/somewhere/moec")


def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    save(store_in(shared), OBJECTS, {"a": b"one"})
    shared.chmod(0o777)
    with pytest.warns(
        CacheWarning, match=r"shared is not used: other users can write to it.*chmod 700"
    ):
        store = store_in(shared)
    assert load(store, OBJECTS, "a") is None


def test_a_folder_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.warns(CacheWarning, match="other users can write to it"):
        assert store_in(tmp_path / "cache").folder is None


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(CacheWarning, match=r"file/cache is not used: a part of the path is a file"):
        assert store_in(tmp_path / "file" / "cache").folder is None


@pytest.mark.parametrize("size", ["much", "-1", "0", "inf", "nan"])
def test_a_limit_that_is_no_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    monkeypatch.setenv("MOEC_CACHE_SIZE", size)
    with pytest.warns(CacheWarning, match=f"MOEC_CACHE_SIZE is '{size}': give a number of GiB"):
        assert store_in(tmp_path / "cache").folder is None


@pytest.mark.parametrize("error", [28, 30])  # ENOSPC, EROFS
def test_a_full_or_read_only_disk_warns_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    save(store, OBJECTS, {"a": b"one"})

    def refuse(source: str, target: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "replace", refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(store, OBJECTS, {"b": b"two"})
        save(store, OBJECTS, {"c": b"three"})
    (warning,) = caught
    assert reason(OSError(error, "")) in str(warning.message)
    assert [entry.path.name for entry in entries(store)] == ["a"]
    assert load(store, OBJECTS, "a") == b"one"


def test_commands_say_it_in_one_sentence(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "x.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")  # no tensors
    monkeypatch.setenv("MOEC_CACHE", str(tmp_path / "file" / "x"))
    command = moec_command("compile", str(tmp_path), "-o", str(tmp_path / "out.moec"))
    done = warm.run(command, ROOT)
    first = done.stderr.splitlines()[0]
    assert first.startswith(f"warning: the cache {tmp_path / 'file' / 'x'} is not used: ")
    assert done.returncode == 1


def test_keys_tell_parts_apart() -> None:
    assert key_of("ab", "c") != key_of("a", "bc")
    assert key_of("a", "") != key_of("a")
    assert key_of("a") == key_of("a")
