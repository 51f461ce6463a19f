"""Every example of a system runs as from a shell, in this process; the page of the systems matches
the records."""

from __future__ import annotations

import pytest

from docs.systems import PAGE, ROOT, page, read
from tests.systems.records import load

NAMES = sorted(path.stem for path in (ROOT / "examples" / "systems").glob("[0-9][0-9]_*.py"))


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    load(name).main([])
    assert "eager" in capsys.readouterr().out


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run make pages"


def test_each_system_has_a_record() -> None:
    assert {record.source.example for record in read()} == set(NAMES)
