"""Measurements as JSON lines: one record per run of a command on a machine.

    {"claim": "layer-bf16", "case": "olmoe", "machine": "AMD EPYC, Zen 4", "date": "2026-11-26",
     "recorded": "5c9f335", "command": "python -m benchmarks.layers.layer ...", "rows": [...]}

`rows` holds the figures, one object per row of the claim's table. `commit` is the measured commit.
Older records have `recorded` instead, the commit that added the figures. `versions`, `conditions`
and `notes` are text.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
UNRECORDED = "not recorded"

Cell = str | int | float | None


@dataclass(frozen=True)
class Record:
    claim: str
    machine: str
    rows: tuple[Mapping[str, Cell], ...]
    case: str = ""
    date: str = ""
    commit: str = ""
    recorded: str = ""
    command: str = ""
    versions: str = ""
    conditions: str = ""
    notes: str = ""


def parse_record(line: str, where: str) -> Record:
    """The record of one line. Raises ValueError, naming `where`, for a field that records do not
    have."""
    entry = json.loads(line)
    unknown = set(entry) - {field.name for field in fields(Record)}
    missing = {"claim", "machine", "rows"} - set(entry)
    if unknown or missing:
        raise ValueError(f"{where}: unknown fields {sorted(unknown)}, missing {sorted(missing)}")
    if not entry["rows"]:
        raise ValueError(f"{where}: no rows")
    return Record(**{**entry, "rows": tuple(entry["rows"])})


def read_records(folder: Path = RESULTS) -> Iterator[Record]:
    """All records of a folder's .jsonl files, in the order of their lines."""
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield parse_record(line, f"{path.name}:{number}")


def commit_here() -> str:
    """The commit that is checked out; empty outside of a clone."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(words, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def measured_now(
    claim: str, case: str, machine: str, rows: Sequence[Mapping[str, Cell]], conditions: str
) -> Record:
    """The record of this process's measurement: its command, the date, the commit, the versions."""
    words = [*_script_words(Path(sys.argv[0])), *_without_record(sys.argv[1:])]
    return Record(
        claim,
        machine,
        tuple(rows),
        case,
        date.today().isoformat(),
        commit_here(),
        command=shlex.join(["python", *words]),
        versions=f"torch {version('torch')}, apache-tvm {version('apache-tvm')}",
        conditions=conditions,
    )


def _script_words(script: Path) -> list[str]:
    """Python's arguments that run a script: a benchmark as a module, any other by its path."""
    parts = script.with_suffix("").parts
    if "benchmarks" not in parts:
        return [f"{script.parent.name}/{script.name}"]
    at = len(parts) - 1 - parts[::-1].index("benchmarks")
    return ["-m", ".".join(part for part in parts[at:] if part != "__main__")]


def _without_record(words: Sequence[str]) -> list[str]:
    """A command without --record FILE and --machine NAME, which only affect the record."""
    dropped = {
        i + offset
        for i, word in enumerate(words)
        if word in ("--record", "--machine")
        for offset in (0, 1)
    }
    return [word for i, word in enumerate(words) if i not in dropped]


def add_record_options(parser: argparse.ArgumentParser, machine: str) -> None:
    """Adds --record and --machine; the default of --machine is the name of this machine's
    processor."""
    parser.add_argument("--record", type=Path, help="add what is measured to this .jsonl file")
    parser.add_argument("--machine", default=machine, help="its kind, as in the other records")


def record_if_asked(
    options: argparse.Namespace,
    claim: str,
    case: str,
    rows: Sequence[Mapping[str, Cell]],
    conditions: str,
) -> None:
    """Appends the measurement to the file of --record, if the option is set."""
    if options.record is not None:
        record = measured_now(claim, case, options.machine, rows, conditions)
        append_record(record, options.record)


def append_record(record: Record, path: Path) -> None:
    """Appends a record to a file; empty fields are left out."""
    entry = {f.name: getattr(record, f.name) for f in fields(Record)}
    text = json.dumps({k: v for k, v in entry.items() if v}, ensure_ascii=False)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def newest(records: Iterable[Record]) -> list[Record]:
    """The latest record for each machine and case; of equal dates, the last line.

    A record without a machine is left out if its case has one with a machine.
    """
    latest: dict[tuple[str, str], Record] = {}
    for record in records:
        key = (record.machine, record.case)
        if key not in latest or record.date >= latest[key].date:
            latest[key] = record
    recorded = {case for machine, case in latest if machine != UNRECORDED}
    return [r for r in latest.values() if r.machine != UNRECORDED or r.case not in recorded]
