"""The key of a checkpoint and of options: what it covers, and when files are hashed."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from moec.commands.compilation import checkpoint_key as keys
from moec.commands.compilation.checkpoint_key import CheckpointKey, checkpoint_key
from moec.target import cpu

OPTIONS = {"target": "cpu", "verify": True, "passes": "", "shapes": ()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "author" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


def key_of(checkpoint: Path, options: Mapping[str, object] = OPTIONS) -> CheckpointKey:
    key = checkpoint_key(str(checkpoint), options)
    assert key is not None
    return key


@pytest.mark.parametrize(
    "change", ["weights", "new file", "file name", "options", "machine", "source", "versions"]
)
def test_the_key_tells_what_the_artifact_depends_on(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    before = key_of(checkpoint)
    value = before.value()
    assert value is not None
    assert value == key_of(checkpoint, dict(OPTIONS)).value()
    assert value.startswith(before.start)
    options = OPTIONS
    match change:
        case "weights":
            (checkpoint / "model.safetensors").write_bytes(bytes(999) + b"\1")
        case "new file":
            (checkpoint / "tokenizer.json").write_text("{}")
        case "file name":
            (checkpoint / "model.safetensors").rename(checkpoint / "other.safetensors")
        case "options":
            options = {**OPTIONS, "passes": "-fuse-norm"}
        case "machine":
            monkeypatch.setattr(cpu, "processor", lambda: "another")
        case "source":
            monkeypatch.setattr(keys, "source_version", lambda: "another")
        case "versions":
            monkeypatch.setattr(keys, "version", lambda name: "another")
    after = key_of(checkpoint, options)
    assert after.value() is not None
    assert after.value() != value
    assert (after.start == before.start) == (change in ("weights", "new file", "file name"))


def test_models_of_other_kinds_have_no_key(tmp_path: Path) -> None:
    assert checkpoint_key("file.py:make", OPTIONS) is None
    assert checkpoint_key(str(tmp_path), OPTIONS) is None


def test_every_byte_of_every_block_counts(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "BLOCK_BYTES", block := mmap.ALLOCATIONGRANULARITY)
    size = 3 * block + 10
    contents = [b"", bytes(block), bytes(size), bytes(size + 1), bytes(4 * block)]
    for changed in (0, block - 1, block, 3 * block - 1, size - 1):
        contents.append(bytes(changed) + b"\1" + bytes(size - changed - 1))
    values = set()
    for content in contents:
        (checkpoint / "model.safetensors").write_bytes(content)
        values.add(key_of(checkpoint).value())
    assert len(values - {None}) == len(contents)


def test_files_are_hashed_meanwhile(checkpoint: Path) -> None:
    key = key_of(checkpoint)
    with key.hashing():
        assert key.value() == key_of(checkpoint).value()


def _rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    "change",
    [
        _rewrite,
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
)
@pytest.mark.parametrize("meanwhile", [False, True])
def test_files_that_change_meanwhile_give_no_key(
    checkpoint: Path, change: Callable[[Path], Any], meanwhile: bool
) -> None:
    key = key_of(checkpoint)
    if not meanwhile:
        change(checkpoint / "model.safetensors")
        assert key.value() is None
        return
    with key.hashing():
        change(checkpoint / "model.safetensors")
        assert key.value() is None


def test_a_failure_does_not_wait_for_all_files(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "BLOCK_BYTES", mmap.ALLOCATIONGRANULARITY)
    monkeypatch.setattr(keys, "digest_of", lambda block: leaving.wait())
    leaving = Event()
    (checkpoint / "model.safetensors").write_bytes(bytes(100 * mmap.ALLOCATIONGRANULARITY))
    key = key_of(checkpoint)
    with pytest.raises(RuntimeError, match="failed"), key.hashing():
        raise RuntimeError("failed")
    leaving.set()
    assert sum(digest.cancelled() for digest in key._digests) >= 100


def test_what_a_model_is_called_makes_no_difference(checkpoint: Path) -> None:
    """`fetch` gives the artifact the other name."""
    other = checkpoint.parent / "other"
    files = [checkpoint.parent / name for name in ("a.gguf", "b.gguf")]
    for file in files:
        file.write_bytes(b"GGUF")
    assert len({key_of(file).value() for file in files}) == 1
    before = key_of(checkpoint).value()
    assert before == key_of(checkpoint.rename(other)).value()
