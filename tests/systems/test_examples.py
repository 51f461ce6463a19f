"""Every example of a system runs as from a shell, in this process; the page of the systems matches
the records."""

from __future__ import annotations

import pytest

from docs import speeds
from docs.systems import PAGE, ROOT, page, picture, read
from tests.systems.records import load

NAMES = sorted(path.stem for path in (ROOT / "examples" / "systems").glob("[0-9][0-9]_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    load(name).main([])
    assert "eager" in capsys.readouterr().out


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run make pages"
    assert speeds.PICTURE.read_text(encoding="utf-8") == picture(), "run make pages"


def test_a_slower_system_and_one_without_a_measurement_show_in_the_picture() -> None:
    drawn = speeds.picture([speeds.Bar("faster", 2.0), speeds.Bar("slower", 0.5),
                            speeds.Bar("not timed", None)])  # fmt: skip
    bars = [line for line in drawn.splitlines() if line.startswith('<rect x="')]
    assert [speeds.FASTER in bar for bar in bars] == [True, False]
    assert all('width="100.0"' in bar for bar in bars)
    assert "not measured" in drawn


def test_each_system_has_a_record() -> None:
    assert {record.source.example for record in read()} == set(NAMES)
