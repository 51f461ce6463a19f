"""The artifact of a checkpoint that was already compiled with the same options is cached."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import moec
from moec.cache import ARTIFACTS, Store, entries, load, store_in
from moec.commands.compile import fetch, keep
from moec.runtime.artifact import manifest
from moec.runtime.artifact.container import open_container
from tests.command_line import invoke


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_in(tmp_path / "cache")


def test_it_is_written_where_nothing_else_is_lost(store: Store, tmp_path: Path) -> None:
    output, artifact = tmp_path / "out.moec", tmp_path / "kept.moec"
    compiled = moec.compile(torch.nn.Linear(2, 2), (torch.zeros(1, 2),), verify=False)
    compiled.save(artifact)
    name = compiled.report().model

    def fetched(key: str, output: Path, overwrite: bool = False) -> bool:
        return fetch(store, key, name, output, overwrite=overwrite)

    keep(store, "key", artifact)
    output.write_bytes(b"a damaged one")
    assert not fetched("key", output)
    output.unlink()
    assert fetched("key", output)
    assert output.read_bytes() == artifact.read_bytes()
    assert fetched("key", output, overwrite=True)
    assert not fetched("other", output, overwrite=True)
    users_file = tmp_path / "mine.txt"
    users_file.write_text("no artifact")
    assert not fetched("key", users_file, overwrite=True)
    assert not fetched("key", tmp_path, overwrite=True)
    assert users_file.read_text() == "no artifact"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_too_large_is_not_kept(store: Store, tmp_path: Path) -> None:
    (tmp_path / "out.moec").write_bytes(bytes(1000))
    keep(Store(store.folder, limit=8 * 999), "key", tmp_path / "out.moec")
    assert not list(entries(store))


def test_a_second_compilation_gives_the_same_artifact_and_report(
    short_moe: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEC_CACHE", str(store.folder))
    model = tmp_path / "model"
    shutil.copytree(short_moe, model)

    def run(*words: str) -> Any:
        arguments = ["compile", str(model), "-o", str(tmp_path / "out.moec"), "--force", *words]
        result = invoke(*arguments)
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

    model = model.rename(tmp_path / "other")
    assert json.loads(run("--json").stdout) == {**again, "model": f"{tmp_path.name}/other"}
    cached = dict(open_container(tmp_path / "out.moec", copy=True))
    monkeypatch.undo()
    monkeypatch.setenv("MOEC_CACHE", "off")
    run()
    compiled = dict(open_container(tmp_path / "out.moec"))
    assert {*cached} == {*compiled}
    differing = {name for name in cached if cached[name] != compiled[name]}
    assert differing <= {manifest.NAME}  # in which the seconds of phases are
