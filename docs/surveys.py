"""Writes docs/surveys.md: the matrices of the two surveys among the systems, from their tests'
records.

python -m docs.surveys

tests/systems/test_10_… and test_15_… each write a file (tests/golden/systems/survey_NN.json,
`--update-golden`). Every cell names the test that passes, or the reason why it is not supported.
The same list parametrises the tests, so a cell without a test cannot be written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.render import table

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "tests" / "golden" / "systems"
PAGE = ROOT / "docs" / "surveys.md"
HEAD = """\
# What the surveys sort models by

<!-- Written by `python -m docs.surveys`; not edited. -->

Two of [the twenty-four systems](systems.md) are surveys. Their axes are a matrix of small models
here: each cell names the test that compiles the model and compares it with eager PyTorch, gradients
where it is trained, or says that there is no support, and why.
"""


@dataclass(frozen=True)
class Cell:
    """`line` and `column` are those of a matrix. `test` is the name of a test in the survey's file,
    with its parameters. `unsupported` is the reason, if that test asserts that moec does
    nothing."""

    line: str
    column: str
    test: str
    unsupported: str = ""


@dataclass(frozen=True)
class Survey:
    number: int
    title: str
    paper: str
    file: str
    cells: tuple[Cell, ...]

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @property
    def record(self) -> Path:
        return RECORDS / f"survey_{self.number:02}.json"


def parse(text: str) -> Survey:
    entry = json.loads(text)
    return Survey(**entry | {"cells": tuple(Cell(**cell) for cell in entry["cells"])})


def read() -> list[Survey]:
    """The surveys in the order of their numbers."""
    return [
        parse(path.read_text(encoding="utf-8")) for path in sorted(RECORDS.glob("survey_*.json"))
    ]


def page() -> str:
    return "\n".join([HEAD, *(line for survey in read() for line in section(survey))])


def section(survey: Survey) -> Iterator[str]:
    yield f"## {survey.title}"
    yield ""
    yield f"[arXiv {survey.paper}](https://arxiv.org/abs/{survey.paper}); the tests are in"
    yield f"`{survey.file}`, the models in `examples/systems/`."
    yield ""
    lines = dict.fromkeys(cell.line for cell in survey.cells)
    columns = dict.fromkeys(cell.column for cell in survey.cells)
    cells = {(cell.line, cell.column): cell for cell in survey.cells}
    reasons = {
        reason: f"unsupported ({number})"
        for number, reason in enumerate(
            dict.fromkeys(cell.unsupported for cell in survey.cells if cell.unsupported), 1
        )
    }
    rows = [[line, *(_show(cells[line, column], reasons) for column in columns)] for line in lines]
    yield table([["", *columns], *rows])
    yield ""
    for reason, mark in reasons.items():
        yield f"- {mark}: {reason}"
    if reasons:
        yield ""


def _show(cell: Cell, reasons: dict[str, str]) -> str:
    return reasons.get(cell.unsupported, f"`{cell.test}`")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
