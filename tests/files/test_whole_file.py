"""A file appears in one step, with the permissions of a new file, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.files.regular_file import whole_file


def test_it_appears_at_the_end_with_the_rights_of_a_new_file(tmp_path: Path) -> None:
    path, other = tmp_path / "a.bin", tmp_path / "b.bin"
    other.touch()
    with whole_file(path) as file:
        file.write(b"text")
        assert not path.exists()
    assert path.read_bytes() == b"text"
    assert path.stat().st_mode == other.stat().st_mode
    assert sorted(tmp_path.iterdir()) == [path, other]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")

    def fail() -> None:
        with whole_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"before"
    assert [*tmp_path.iterdir()] == [path]
