"""moec cache: its listing, and removal."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from moec.cache import OBJECTS, RUNS, save, store_in
from tests.command_line import invoke

run = partial(invoke, "cache")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOEC_CACHE", str(folder))
    monkeypatch.setenv("MOEC_CACHE_SIZE", "1")
    store = store_in(folder)
    save(store, OBJECTS, {"a": bytes(1000), "b": bytes(3000)})
    save(store, RUNS, {"c": b"{}"})
    return folder


def test_it_shows_what_is_kept(folder: Path) -> None:
    lines = run().stdout.splitlines()
    assert lines[0] == f"{folder}, at most 1.1 GB"
    assert [line.split() for line in lines[1:]] == [
        ["objects", "2", "4.1", "kB"],
        ["libraries", "0", "0", "bytes"],
        ["artifacts", "0", "0", "bytes"],
        ["runs", "1", "47", "bytes"],
        ["models", "0", "0", "bytes"],
    ]
    shown = json.loads(run("--json").stdout)
    assert (shown["folder"], shown["limit"]) == (str(folder), 2**30)
    assert shown["kinds"]["objects"] == {"entries": 2, "bytes": 4090}


def test_it_clears(folder: Path) -> None:
    (folder / "mine.txt").write_text("no entry")
    assert run("clear").stdout == f"removed 3 entries from {folder}\n"
    assert run("clear").stdout == f"removed 0 entries from {folder}\n"
    assert (folder / "mine.txt").exists()


def test_nothing_was_kept_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEC_CACHE", str(tmp_path / "none"))
    assert "0 bytes" in run().stdout
    assert not (tmp_path / "none").exists()


def test_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEC_CACHE", "off")
    assert run().stdout == "MOEC_CACHE is off: nothing is cached\n"
    assert json.loads(run("--json").stdout) == {"folder": None}
    result = run("clear")
    words = "error: MOEC_CACHE is off: there is no cache to clear\n"
    assert (result.exit_code, result.stderr) == (2, words)


def test_a_limit_that_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEC_CACHE_SIZE", "much")
    result = run()
    assert result.exit_code == 2
    assert "MOEC_CACHE_SIZE is 'much': give a number of GiB" in result.stderr
