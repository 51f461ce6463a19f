"""Every example of a system runs as from a shell, in this process; the page of the systems matches
the records."""

from __future__ import annotations

from itertools import takewhile

import pytest

from benchmarks.systems.sparse import FORMS
from docs import speeds
from docs.systems import PAGE, ROOT, page, picture, read, times
from tests.systems.records import load

NAMES = sorted(path.stem for path in (ROOT / "examples" / "systems").glob("[0-9][0-9]_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    load(name).main([])
    assert "eager" in capsys.readouterr().out


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run make pages"
    assert speeds.PICTURE.read_text(encoding="utf-8") == picture(), "run make pages"


def test_each_figure_has_a_verdict() -> None:
    """`comparable` alone, or with the reason why not."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    heads = [n for n, line in enumerate(lines) if line == "| figure | here | paper | verdict |"]
    rows = [row for n in heads for row in takewhile(lambda line: line, lines[n + 2 :])]
    verdicts = [row.strip("| ").split(" | ")[-1] for row in rows]
    reasons = [verdict.partition("not comparable: ")[2] for verdict in verdicts]
    assert len(rows) > 70
    assert all(
        verdict == "comparable" or why for verdict, why in zip(verdicts, reasons, strict=True)
    )


def test_a_system_with_a_dense_layer_is_compared_with_both_forms() -> None:
    for name in FORMS:
        _, row = times()[int(name[:2])]
        dense = min(float(str(row[way])) for way in ("eager", "inductor"))
        others = min(float(str(row[way])) for way in ("sparse eager", "sparse inductor"))
        assert row["ratio"] == pytest.approx(min(dense, others) / float(str(row["moec"])), abs=0.01)
        assert row["dense ratio"] == pytest.approx(dense / float(str(row["moec"])), abs=0.01)


def test_a_slower_system_and_one_without_a_measurement_show_in_the_picture() -> None:
    drawn = speeds.picture([speeds.Bar("faster", 2.0), speeds.Bar("slower", 0.5),
                            speeds.Bar("not timed", None)])  # fmt: skip
    bars = [line for line in drawn.splitlines() if line.startswith('<rect x="')]
    assert [speeds.FASTER in bar for bar in bars] == [True, False]
    assert all('width="100.0"' in bar for bar in bars)
    assert "not measured" in drawn
    texts = [line.partition(">")[2].partition("<")[0] for line in drawn.splitlines()]
    assert {speeds.TITLE, speeds.AXIS, "1", "2"} <= set(texts)


def test_each_system_has_a_record() -> None:
    assert {record.source.example for record in read()} == set(NAMES)
