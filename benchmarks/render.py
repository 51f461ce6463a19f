"""Writes docs/benchmarks/ from benchmarks/results/*.jsonl: a page for each claim, and an index.

python -m benchmarks.render
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.claims import CLAIMS, Claim
from benchmarks.records import RESULTS, Cell, Record, newest, read_records

PAGES = Path(__file__).parents[1] / "docs" / "benchmarks"
WRITTEN = "<!-- Written by `python -m benchmarks.render` from benchmarks/results/*.jsonl. -->"
HEAD = f"""\
# Benchmarks

{WRITTEN}

Each page is one claim and holds the newest run of each case on each kind of machine. Every machine
is a virtual one with two cores, shared with others: its speed changes from minute to minute.
Compare rows of one run, not of two. Weights are random unless a table says otherwise. The Xeon
shares a third-level cache of 480 MB with other machines, so that the few weights of one token may
come from there faster than the measured bandwidth of the memory. For the records whose machine says
"generation not recorded" or "not recorded" nobody wrote down more.

Commands, dates and conditions are at the end of each page. `recorded` is the commit that wrote the
figures down.
"""
SPEEDS = """\
Tokens a second of a model with the shape of Granite-3.0-1B-A400M ([its page](model.md) has the
shares of the measured peak and bandwidth):
"""


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def decimals(cell: Cell) -> int:
    return len(str(cell).partition(".")[2]) if isinstance(cell, float) else 0


def show(cell: Cell, positions: int) -> str:
    """A cell as text; floats of one column have the same number of decimals."""
    if cell is None:
        return ""
    return f"{cell:.{positions}f}" if isinstance(cell, float) else str(cell)


def cells(records: Sequence[Record]) -> list[list[str]]:
    """The rows of records in one table; for several records, with columns for machine and case."""
    columns = list(dict.fromkeys(name for r in records for row in r.rows for name in row))
    positions = {c: max(decimals(row.get(c)) for r in records for row in r.rows) for c in columns}
    about = ["machine", "case"] if len(records) > 1 else []
    body = [
        [
            *([r.machine, r.case] if about else []),
            *(show(row.get(c), positions[c]) for c in columns),
        ]
        for r in records
        for row in r.rows
    ]
    return [[*about, *columns], *body]


def provenance(record: Record) -> Iterator[str]:
    facts = [
        record.date,
        f"commit {record.commit}" if record.commit else "",
        f"recorded in {record.recorded}" if record.recorded else "",
    ]
    about = ", ".join(fact for fact in (*facts, record.versions) if fact)
    yield f"    **{record.machine}: {record.case}** ({about})"
    yield ""
    if record.command:
        yield f"        {record.command}"
        yield ""
    for text in (record.conditions, record.notes):
        if text:
            yield f"    {text}"
            yield ""


def section(claim: Claim, records: Sequence[Record]) -> str:
    shown = newest(records)
    shown.sort(key=lambda record: record.machine)
    tables = [[record] for record in shown] if claim.by_case else [shown]
    lines = [f"# {claim.title}", "", WRITTEN, "", claim.text, ""]
    for part in tables:
        caption = [f"**{part[0].case}** ({part[0].machine})", ""] if len(part) == 1 else []
        lines += [*caption, table(cells(part)), ""]
    lines += ['??? note "Commands, dates, conditions"', ""]
    lines += [line for record in shown for line in provenance(record)]
    return "\n".join(lines).rstrip() + "\n"


def index(by_claim: Mapping[str, Sequence[Record]]) -> str:
    """The page that lists the claims, and the tokens per second of a model."""
    rows = [["claim", "cases", "machines", "newest"]]
    for claim in (claim for claim in CLAIMS if claim.name in by_claim):
        shown = newest(by_claim[claim.name])
        cases, machines = ({r.case for r in shown}, {r.machine for r in shown})
        dates = max(record.date for record in shown)
        link = f"[{claim.title}]({claim.name}.md)"
        rows.append([link, str(len(cases)), str(len(machines)), dates])
    model = by_claim.get("model", ())
    machines = sorted({record.machine for record in newest(model)})
    speeds = [f"**{machine}**\n\n{speed_table(model, machine)}\n" for machine in machines]
    return "\n".join((HEAD, SPEEDS, *speeds, table(rows), ""))


def render(folder: Path = RESULTS) -> dict[str, str]:
    """The pages by file name. Raises ValueError for a record whose claim does not exist."""
    by_claim: dict[str, list[Record]] = {}
    for record in read_records(folder):
        by_claim.setdefault(record.claim, []).append(record)
    if unknown := set(by_claim) - {claim.name for claim in CLAIMS}:
        raise ValueError(f"no such claims: {sorted(unknown)}; they are listed in claims.py")
    pages = {
        f"{claim.name}.md": section(claim, by_claim[claim.name])
        for claim in CLAIMS
        if claim.name in by_claim
    }
    return {"index.md": index(by_claim), **pages}


def readme_table(machine: str = "AMD EPYC, Zen 4") -> str:
    """Tokens per second of moec and of other runtimes in the same run, for README.md."""
    return speed_table([r for r in read_records() if r.claim == "model"], machine)


def speed_table(records: Sequence[Record], machine: str) -> str:
    head = ["moec in", "beside", "prefill: moec", "other", "", "decode: moec", "other", ""]
    rows = [head]
    for record in newest(records):
        if record.machine != machine:
            continue
        ours, *others = record.rows
        for row in others:
            cells = [record.case.partition(" ")[0], str(row["runtime"])]
            for phase in ("prefill", "decode"):
                speed, ratio = f"{phase} tokens/s", f"{phase} ratio"
                cells += [str(ours[speed]), str(row[speed]), f"{show(row[ratio], 2)} x"]
            rows.append(cells)
    return table(rows)


if __name__ == "__main__":
    PAGES.mkdir(exist_ok=True)
    for name, text in render().items():
        (PAGES / name).write_text(text, encoding="utf-8")
