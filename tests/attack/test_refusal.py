"""One case of each damage of a checkpoint; `python -m tests.attack folders gguf` has hundreds."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any, Never

import pytest

from moec.errors import CaptureError
from tests.attack import folders, gguf_files, refusal


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    folders.write_seeds(folder)
    return folder


@pytest.mark.parametrize("name", folders.WRITERS)
def test_damaged_folders(name: str, folder: Path) -> None:
    path = refusal.written(folders.WRITERS[name], folder, random.Random(name))
    assert refusal.faults_of(path) == []


@pytest.mark.parametrize("name", gguf_files.WRITERS)
def test_damaged_gguf_files(name: str, tmp_path: Path) -> None:
    path = refusal.written(gguf_files.WRITERS[name], tmp_path, random.Random(name))
    assert refusal.faults_of(path) == []


def test_what_is_not_damaged_is_read(folder: Path, tmp_path: Path) -> None:
    for name in ("llama", "deepseek2"):
        (tmp_path / "model.gguf").write_bytes(gguf_files.draft(name).encode())
        assert refusal.faults_of(tmp_path / "model.gguf") == ["is read, and should be refused"]
    for name in folders.NAMES:
        path = folder / f"formats/{name}/quantised"
        assert refusal.faults_of(path) == ["is read, and should be refused"], name


def _much_memory() -> Never:
    bytearray(refusal.MEMORY + (1 << 29))  # part of it may be memory that the process had freed
    raise CaptureError("it is damaged")


def _much_time() -> Never:
    start = time.process_time()
    while time.process_time() - start < 0.02:
        pass
    raise CaptureError("it is damaged")


def _two_lines() -> Never:
    raise CaptureError("it is\ndamaged")


def _another_error() -> Never:
    raise KeyError("name")


@pytest.mark.parametrize(
    ("opened", "words"),
    [
        (_much_memory, "ends in MemoryError()"),
        (_much_time, "takes 0.0 s"),
        (_two_lines, "more than one line: it is\ndamaged"),
        (_another_error, "ends in KeyError('name')"),
    ],
)
def test_faults_are_noticed(opened: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal, "open_source", lambda path: opened())
    monkeypatch.setattr(refusal, "SECONDS", 0.01)
    assert refusal.faults_of(Path("model.gguf")) == [words]
