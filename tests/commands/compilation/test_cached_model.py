"""Commands that run artifacts take models too: they are compiled into the cache, once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moec.cache import MODELS, OBJECTS, Store, entries, save
from moec.commands.compilation import cached_model
from moec.commands.compilation.cached_model import artifact_of, is_model
from moec.commands.compilation.checkpoint_key import checkpoint_key
from moec.errors import UsageError
from tests.command_line import invoke


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / MODELS


def test_a_model_is_compiled_and_verified_and_runs(
    short_moe: Path, folder: Path, tmp_path: Path
) -> None:
    """By the processes of a user: the second one compiles nothing."""
    words = [sys.executable, "-m", "moec", "run", str(short_moe), "--prompt", "def ", "--json"]
    first = subprocess.run(words, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    (artifact,) = folder.iterdir()
    assert artifact.name.startswith(f"{short_moe.name}-")
    assert folder.stat().st_mode & 0o077 == 0
    written = artifact.stat().st_ino
    os.utime(artifact, (0, 0))
    again = invoke(*words[3:])
    texts = [json.loads(each.stdout)["text"] for each in (first, again)]
    assert texts[0] == texts[1]
    assert artifact.stat().st_ino == written
    assert artifact.stat().st_mtime > 0  # used now
    assert "intact" in invoke("verify", artifact).stdout
    chat = invoke("chat", short_moe, input="x\n")
    assert "chat template" in chat.stderr  # of the artifact, which was found
    assert [*folder.iterdir()] == [artifact]


def compiler(monkeypatch: pytest.MonkeyPatch, code: int = 0) -> list[list[str]]:
    requests: list[list[str]] = []

    def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        requests.append(words)
        if not code:
            Path(words[words.index("-o") + 1]).write_bytes(b"an artifact")
        return subprocess.CompletedProcess(words, code)

    monkeypatch.setattr(cached_model.subprocess, "run", run)
    return requests


def test_other_contents_are_compiled_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = compiler(monkeypatch)
    monkeypatch.setattr(cached_model, "local_model", lambda text, revision, quiet: text)
    file = tmp_path / "a b.gguf"
    file.write_bytes(b"GGUF")
    first = artifact_of(file)
    assert artifact_of(file) == first
    file.write_bytes(b"GGUG")
    assert artifact_of(file) != first
    assert [words[4] for words in requests] == [str(file)] * 2
    assert first.name.startswith("a-b-")
    assert all(mark not in first.name for mark in " /")


def test_a_compilation_that_fails_ends_the_command(
    short_moe: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(monkeypatch, 4)
    for words in (["run", short_moe, "--prompt", "x"], ["chat", short_moe]):
        result = invoke(*words)
        assert result.exit_code == 4
        assert result.stdout == ""


def test_without_a_cache(short_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEC_CACHE", "off")
    with pytest.raises(UsageError, match=r"is off or cannot be used: set MOEC_CACHE .* moec comp"):
        artifact_of(short_moe)


def test_what_is_a_model(short_moe: Path, tmp_path: Path) -> None:
    assert is_model(short_moe)
    assert is_model(Path("org/name"))
    for other in (tmp_path, Path("out/name.moec"), Path("nothing"), Path("a/b/c"), Path(__file__)):
        assert not is_model(other)
        assert artifact_of(other) == other


def test_all_files_of_a_split_model_count(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")

    def value() -> str | None:
        key = checkpoint_key(str(parts[0]), {})
        assert key is not None
        return key.value()

    before = value()
    assert before == value()
    parts[1].write_bytes(b"FUGG")
    assert value() not in (before, None)


def test_the_cache_lists_and_prunes_models(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o700)
    store = Store(folder.parent, 10)
    for name, days in (("new-1.moec", 1), ("old-2.moec", 40), ("older-3.moec", 50)):
        (folder / name).write_bytes(bytes(1000))
        os.utime(folder / name, (time.time() - 86400 * days,) * 2)
    save(store, OBJECTS, {"a": bytes(1000)})  # beyond the limit, which is not of models
    assert invoke("cache", "list").stdout.splitlines() == [
        "   1.0 kB  used 1.0 days ago  new-1.moec",
        "   1.0 kB  used 40.0 days ago  old-2.moec",
        "   1.0 kB  used 50.0 days ago  older-3.moec",
    ]
    assert json.loads(invoke("cache", "list", "--json").stdout)[0] == {
        "model": "new-1.moec", "bytes": 1000, "days": 1.0,
    }  # fmt: skip
    assert "no model of the cache begins with x: see moec cache list" in (
        invoke("cache", "prune", "x").stderr
    )
    assert invoke("cache", "prune", "--days", "45").stdout == "removed older-3.moec\n"
    assert invoke("cache", "prune").stdout == "removed old-2.moec\n"
    assert invoke("cache", "prune").stdout == ""
    assert invoke("cache", "prune", "new").stdout == "removed new-1.moec\n"
    assert [entry.kind for entry in entries(store)] == [OBJECTS]
