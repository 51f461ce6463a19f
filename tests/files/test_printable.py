"""No control character of a name reaches a terminal, and system errors get our wording."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moec.files.os_errors import reason
from moec.files.printable import all_printable, printable, printable_json
from moec.report.report import Report
from tests.commands import models


def test_controls_become_escapes() -> None:
    assert printable("a\x1b[31mb\x07\r\x9b\u202ec") == r"a\x1b[31mb\x07\r\x9b\u202ec"
    assert printable("tab\tline\nünïcödé 模型") == "tab\tline\nünïcödé 模型"


def test_json_means_the_same() -> None:
    text = json.dumps("a\x1b\x9b\u2028ü", ensure_ascii=False)
    assert printable_json(text) == '"a\\u001b\\u009b\\u2028ü"'
    assert json.loads(printable_json(text)) == "a\x1b\x9b\u2028ü"


def test_all_of_a_document() -> None:
    document = {"\x07": ["\x1b", 1, None], "x": ("\x7f",)}
    assert all_printable(document) == {"\\x07": ["\\x1b", 1, None], "x": ("\\x7f",)}


def test_a_report_of_a_strange_model() -> None:
    recorded = models.report().to_dict() | {"model": "m\x1b]0;title\x07", "notes": ["\x9b2J"]}
    shown = str(Report.of_dict(recorded))
    assert r"m\x1b]0;title\x07" in shown
    assert r"note: \x9b2J" in shown
    assert not {"\x1b", "\x07", "\x9b"} & set(shown)


OPENED: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "none").read_bytes(), "there is no such file or folder"),
    (lambda folder: folder.read_bytes(), "it is a folder, not a file"),
    (lambda folder: (folder / "file" / "x").read_bytes(), "a part of the path is a file"),
    (lambda folder: (folder / ("x" * 5000)).read_bytes(), "the name is too long"),
    (lambda folder: (folder / "loop").read_bytes(), "its links form a cycle"),
]


@pytest.mark.parametrize(("opens", "words"), OPENED)
def test_what_the_system_says(opens: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError) as caught:  # noqa: PT011
        opens(tmp_path)
    assert words in reason(caught.value)


def test_what_the_system_says_without_words_of_ours() -> None:
    assert reason(OSError(errno.EPIPE, "Broken pipe")) == "Broken pipe"
    assert reason(OSError()) == "OSError"
