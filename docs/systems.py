"""Writes docs/systems.md and its picture from the records of the systems' tests and from the
benchmark's measurements.

python -m docs.systems

tests/systems/ writes a record per system (tests/golden/systems/NN.json, `--update-golden`), and
fails if a record is out of date. benchmarks/systems/latency.py measures the times.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.records import Cell, newest, read_records
from benchmarks.render import show, table
from docs import speeds
from docs.measured import COMPARABLE, NO_FIGURE, Figure, measured

__all__ = ["COMPARABLE", "NO_FIGURE", "Figure", "Record", "Source"]

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "tests" / "golden" / "systems"
PAGE = ROOT / "docs" / "systems.md"
CLAIM = "systems"
EXAMPLES = "system-examples"
HEAD = """\
# The twenty-four systems

<!-- Written by `python -m docs.systems`; not edited. -->

Each system is built in `examples/systems/` as its authors define it, in plain PyTorch, and
compiled with moec's public functions. `tests/systems/` asserts what this page says of it, and
writes down the facts; CI fails where page and tests differ. Weights are random unless a section
says otherwise.

`captured` is how: traced by torch.export; speculated, where the code reads its data; or
described, where it cannot be traced. `agreement` is the greatest difference to eager that the test
allows, as a share of the greatest value. Parameters, and the MB of their weights in the artifact,
are those of the small model that the test compiles; published sizes are in the sections. Figures
beside the papers' are counted by the tests, or measured by benchmarks
([Benchmarks](benchmarks/index.md) has commands and machines). A figure is `comparable` only if both
are the same quantity of the same configuration.

`speed` is the time of the fastest of eager and `torch.compile` (Inductor) over moec's, for one
layer at the size that the example's `layer()` states, measured by `benchmarks/systems/latency.py`;
the sections have the times and the machine. Some layers evaluate every expert on every row. For
them `speed` is over the faster of this dense form and of a sparse one with the same results
(`benchmarks/systems/sparse.py`), and `over dense` is over the dense form alone.
"""

Process = Literal["autoregressive", "diffusion", "hybrid", "encoder", "survey"]


@dataclass(frozen=True)
class Source:
    """The description of a system, written by its test; the rest of a record follows from the
    compilation.

    `adds` describes in one or two sentences what moec does for it. `process` and `modalities` are
    the axes of the surveys; `trained` is the data that a test trains a part of it on, empty if no
    test trains it.
    """

    number: int
    title: str
    paper: str
    example: str
    process: Process
    modalities: tuple[str, ...]
    adds: str
    trained: str = ""


@dataclass(frozen=True)
class Record:
    """`blocks` and `passes` are the recognised blocks and the passes of the small model, `bytes`
    the size of its weights; `missing` lists what is not recognised or not supported, with the
    reason."""

    source: Source
    captured: str
    blocks: tuple[str, ...]
    passes: tuple[str, ...]
    agreement: str
    parameters: int
    active_parameters: int
    bytes: int
    figures: tuple[Figure, ...] = ()
    missing: tuple[str, ...] = ()

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def parse(text: str) -> Record:
    entry: dict[str, Any] = json.loads(text)
    lists = {name: tuple(entry[name]) for name in ("blocks", "passes", "missing")}
    source = entry["source"] | {"modalities": tuple(entry["source"]["modalities"])}
    figures = tuple(Figure(**figure) for figure in entry["figures"])
    return Record(**entry | lists | {"source": Source(**source), "figures": figures})


def read() -> list[Record]:
    """All records, in the order of the systems."""
    paths = sorted(RECORDS.glob("[0-9][0-9].json"))
    return [parse(path.read_text(encoding="utf-8")) for path in paths]


def times() -> dict[int, tuple[str, Mapping[str, Cell]]]:
    """The newest row of each system, by its number, with its machine."""
    rows = {}
    records = newest(r for r in read_records() if r.claim == CLAIM)
    for record in sorted(records, key=lambda r: r.date):
        for row in record.rows:
            threads = record.conditions.partition(",")[0]
            number = int(str(row["system"]).partition(" ")[0])
            rows[number] = (f"{record.machine}, {threads}", row)
    return rows


def example_times() -> dict[int, str]:
    """The newest time and memory of each system's example, by its number."""
    texts = {}
    for record in newest(r for r in read_records() if r.claim == EXAMPLES):
        (row,) = record.rows
        number = int(record.case.partition(" ")[0])
        texts[number] = f"{row['seconds']} s, {row['MB']} MB, on two cores of {record.machine}"
    return texts


def page() -> str:
    figures = measured()
    records = [replace(r, figures=(*r.figures, *figures.get(r.source.number, ()))) for r in read()]
    return "\n".join(_page(records, times(), example_times()))


def picture() -> str:
    """The speeds of the page as bars."""
    rows = times()
    return speeds.picture(
        [
            speeds.Bar(
                f"{r.source.number}. {r.source.title}",
                float(str(rows[r.source.number][1]["ratio"])) if r.source.number in rows else None,
            )
            for r in read()
        ]
    )


def _page(
    records: Sequence[Record],
    measured: Mapping[int, tuple[str, Mapping[str, Cell]]],
    examples: Mapping[int, str],
) -> Iterator[str]:
    yield HEAD
    yield table(
        [
            [
                *("", "system", "captured", "blocks", "agreement"),
                *("parameters", "active", "MB", "speed", "over dense"),
            ],
            *(
                [
                    str(r.source.number),
                    f"[{r.source.title}](#{anchor(r.source)})",
                    r.captured,
                    str(len(r.blocks)) if not r.missing else f"{len(r.blocks)}, see below",
                    r.agreement,
                    f"{r.parameters:,}",
                    f"{r.active_parameters:,}",
                    f"{r.bytes / 1e6:.2f}",
                    _speed(measured.get(r.source.number)),
                    _over_dense(measured.get(r.source.number)),
                ]
                for r in records
            ),
        ]
    )
    yield ""
    yield f"![{speeds.TITLE}](images/systems.svg)"
    yield ""
    for record in records:
        number = record.source.number
        yield from _section(record, measured.get(number), examples.get(number))


def _speed(row: tuple[str, Mapping[str, Cell]] | None) -> str:
    return "not measured" if row is None else f"{show(row[1]['ratio'], 2)}x"


def _over_dense(row: tuple[str, Mapping[str, Cell]] | None) -> str:
    ratio = None if row is None else row[1].get("dense ratio")
    return "" if ratio is None else f"{show(ratio, 2)}x"


def anchor(source: Source) -> str:
    """The anchor of a heading: lower case, spaces as hyphens, other punctuation removed."""
    title = f"{source.number} {source.title}".lower()
    return "-".join("".join(c for c in title if c.isalnum() or c in " -").split())


def _section(
    record: Record, row: tuple[str, Mapping[str, Cell]] | None, example: str | None
) -> Iterator[str]:
    source = record.source
    yield f"## {source.number}. {source.title}"
    yield ""
    link = f"[arXiv {source.paper}](https://arxiv.org/abs/{source.paper})"
    yield f"{link}; `examples/systems/{source.example}.py`. {source.adds}"
    yield ""
    axes = ", ".join((source.process, *source.modalities))
    trained = f", a part is trained by a test, on {source.trained}" if source.trained else ""
    yield f"- Axes: {axes}{trained}."
    weights = f"{record.parameters:,} parameters, {record.bytes / 1e6:.2f} MB"
    yield f"- Captured: {record.captured}; {weights}; agreement with eager: {record.agreement}."
    if example is not None:
        yield f"- The example takes {example}."
    for block, count in counted(record.blocks).items():
        yield f"- {count} x {block}"
    yield f"- Passes that changed it: {', '.join(record.passes)}."
    for reason in record.missing:
        yield f"- Missing: {reason}"
    yield ""
    if record.figures:
        rows = [[f.quantity, f.ours, f.paper, f.verdict] for f in record.figures]
        yield table([["figure", "here", "paper", "verdict"], *rows])
        yield ""
    if row is not None:
        machine, cells = row
        yield f"Milliseconds on {machine}: " + ", ".join(
            f"{name} {show(cell, 2)}" for name, cell in cells.items() if name != "system"
        )
        yield ""


def counted(lines: Sequence[str]) -> dict[str, int]:
    return {line: lines.count(line) for line in dict.fromkeys(lines)}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    speeds.PICTURE.write_text(picture(), encoding="utf-8")
