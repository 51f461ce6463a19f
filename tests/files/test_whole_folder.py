"""Folders are replaced as a whole, and an old one survives every failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.files.whole_folder import swap, whole_folder


def write(path: Path, text: str) -> None:
    with whole_folder(path) as new:
        (new / "file").write_text(text)


def test_a_folder_is_replaced(tmp_path):
    for text in ("first", "second"):
        write(tmp_path / "folder", text)
        assert (tmp_path / "folder" / "file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_failure_in_the_block_leaves_the_old_folder(tmp_path):
    write(tmp_path / "folder", "first")

    def fail() -> None:
        with whole_folder(tmp_path / "folder"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "folder" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_rename_that_fails_leaves_the_old_folder(tmp_path):
    write(tmp_path / "folder", "first")
    with pytest.raises(FileNotFoundError):
        swap(tmp_path / "absent", tmp_path / "folder", tmp_path / "old")
    assert (tmp_path / "folder" / "file").read_text() == "first"
