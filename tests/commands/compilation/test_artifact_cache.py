"""The artifact of a checkpoint that was already compiled with the same options is cached."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from moec import __main__ as front
from moec.cache import ARTIFACTS, Store, entries, load, store_in
from moec.commands.compilation import artifact_cache, artifact_frame
from moec.commands.compilation.artifact_cache import fetch, keep, key_for
from moec.commands.compilation.artifact_frame import Frame
from moec.target import cpu

NOT_READ: Any = None
OPTIONS = {"target": "cpu", "verify": True, "passes": "", "shapes": ()}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_in(tmp_path / "cache")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "author" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


@pytest.mark.parametrize(
    "change", ["weights", "new file", "name", "options", "machine", "source", "versions"]
)
def test_the_key_tells_what_the_artifact_depends_on(
    store: Store, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    before = key_for(str(checkpoint), OPTIONS, store)
    assert before == key_for(str(checkpoint), dict(OPTIONS), store)
    options = OPTIONS
    match change:
        case "weights":
            (checkpoint / "model.safetensors").write_bytes(bytes(999) + b"\1")
        case "new file":
            (checkpoint / "tokenizer.json").write_text("{}")
        case "name":
            checkpoint = checkpoint.rename(checkpoint.parent / "other")
        case "options":
            options = {**OPTIONS, "passes": "-fuse-norm"}
        case "machine":
            monkeypatch.setattr(cpu, "processor", lambda: "another")
        case "source":
            monkeypatch.setattr(artifact_cache, "source_version", lambda: "another")
        case "versions":
            monkeypatch.setattr(artifact_cache, "version", lambda name: "another")
    after = key_for(str(checkpoint), options, store)
    assert after is not None
    assert after != before


def test_what_has_no_key(store: Store, checkpoint: Path) -> None:
    assert key_for("file.py:make", OPTIONS, store) is None
    assert key_for(str(checkpoint), OPTIONS, Store(None)) is None


def test_blocks_of_large_files_are_hashed_in_their_order(
    store: Store, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_cache, "_BLOCK", 300)
    weights = checkpoint / "model.safetensors"
    contents = [bytes(1000), bytes(1200), bytes(1001), bytes(999)]
    for last in (299, 300, 999):
        contents.append(bytes(last) + b"\1" + bytes(999 - last))
    keys = set()
    for content in contents:
        weights.write_bytes(content)
        keys.add(key_for(str(checkpoint), OPTIONS, store))
    assert len(keys) == len(contents)


def test_it_is_written_where_nothing_else_is_lost(store: Store, tmp_path: Path) -> None:
    output = tmp_path / "out.moec"

    def fetched(key: str, output: Path, overwrite: bool = False) -> bool:
        return fetch(store, key, tmp_path, output, overwrite=overwrite)

    output.write_bytes(b"an artifact")
    keep(store, "key", tmp_path, output, NOT_READ)
    output.write_bytes(b"a damaged one")
    assert not fetched("key", output)
    assert fetched("key", output, overwrite=True)
    assert output.read_bytes() == b"an artifact"
    assert fetched("key", tmp_path / "new.moec")
    assert (tmp_path / "new.moec").read_bytes() == b"an artifact"
    assert not fetched("other", output, overwrite=True)
    users_file = tmp_path / "mine.txt"
    users_file.write_text("no artifact")
    assert not fetched("key", users_file, overwrite=True)
    assert not fetched("key", tmp_path, overwrite=True)
    assert users_file.read_text() == "no artifact"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".moec")] == []


@pytest.mark.parametrize("frame", [None, Frame(1000, (), (), bytes(1000))])
def test_what_is_too_large_is_not_kept(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frame: Frame | None
) -> None:
    monkeypatch.setattr(artifact_frame, "frame_of", lambda *arguments: frame)
    (tmp_path / "out.moec").write_bytes(bytes(1000))
    keep(Store(store.folder, limit=8 * 999), "key", tmp_path, tmp_path / "out.moec", NOT_READ)
    assert not list(entries(store))


def test_a_second_compilation_gives_the_same_artifact_and_report(
    short_moe: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEC_CACHE", str(store.folder))
    model = tmp_path / "model"
    shutil.copytree(short_moe, model)

    def run(*words: str) -> Any:
        arguments = ["compile", str(model), "-o", str(tmp_path / "out.moec"), "--force", *words]
        result = CliRunner().invoke(front.cli, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        return result

    first = json.loads(run("--json").stdout)
    artifact = (tmp_path / "out.moec").read_bytes()
    (entry,) = (entry for entry in entries(store) if entry.kind == ARTIFACTS)
    assert load(store, ARTIFACTS, entry.path.name) == artifact
    (tmp_path / "out.moec").unlink()

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr("moec.api.compile", never)
    again = json.loads(run("--json").stdout)
    assert {**again, "phases": {}} == {**first, "phases": {}}
    assert (tmp_path / "out.moec").read_bytes() == artifact
    assert run().stdout.endswith(f"wrote {tmp_path / 'out.moec'} (from the cache)\n")
    with pytest.raises(AssertionError, match="compiled again"):
        run("-O", "1")
