"""Writes docs/ops.md, docs/passes.md and the tables in docs/formats.md and docs/api.md from moec.

python -m docs.catalogue
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from moec import pipeline
from moec.capture.decomposition.kernels import LEFT_OUT, WRITTEN_OUT
from moec.codegen.loops.emit import EMIT
from moec.commands.list import first_line, formats, opt_in_passes, passes
from moec.ir.ops import OPS
from moec.options import compile_options

FOLDER = Path(__file__).parent
FAMILIES = {
    "moec": "Sizes and constants",
    "nn": "The dense part of a transformer",
    "moe": "MoE blocks: routing, dispatch, experts, combine",
    "grouped": "Experts over all rows at once",
    "dist": "Rows between the ranks of a plan",
}
WRITTEN = "<!-- Written by `python -m docs.catalogue`; not edited. -->"
END = "<!-- The end of what is written. -->"


def fenced(text: str) -> str:
    return f"```text\n{inspect.cleandoc(text)}\n```"


def family(name: str) -> str:
    return name.partition(".")[0]


def ops_page() -> str:
    """One section per family of ops, with the docstring of each op's reference."""
    return "\n\n".join(_ops()) + "\n"


def _ops() -> Iterator[str]:
    yield "# Ops"
    yield WRITTEN
    yield (
        "A graph holds operators of ATen, with the names and arguments of PyTorch's schemas, and "
        "the ops of moec below. Each has a type rule and a meaning in eager PyTorch "
        "(`moec/ir/ops/`), so that a graph runs at any stage."
    )
    yield fenced(sys.modules["moec.ir.ops"].__doc__ or "")
    for prefix, names in groupby(sorted(OPS, key=_order), key=family):
        yield f"## `{prefix}.*`: {FAMILIES[prefix]}"
        for name in names:
            reference = OPS[name].reference
            yield f"### {name}"
            yield f"`{_file(reference.__module__)}`"
            yield fenced(reference.__doc__ or "")
    yield "## Operators of ATen that become loops"
    yield (
        "These compile on every target. Linear layers, attention, norms and top-k have kernels "
        "of their own besides (`codegen/rules/`). Composite operators become them in the "
        "capture, by torch's rules, and by those of the list after this one. Any other "
        "operator stops the compilation; all of them are named in one message."
    )
    aten = sorted(name.removeprefix("aten.") for name in EMIT if name.startswith("aten."))
    yield ", ".join(f"`{name}`" for name in aten)
    yield (
        "These are written out in them (`moec/capture/decomposition/`); "
        "positions of maxima, averages of integers and adaptive maxima of more than one window "
        "stay refused. A NaN in a bag makes its maximum NaN; eager's depends on the order of rows."
    )
    written = sorted(str(op).removeprefix("aten.") for op in (*WRITTEN_OUT, *LEFT_OUT))
    yield ", ".join(f"`{name}`" for name in written)


def _order(name: str) -> tuple[int, str]:
    return list(FAMILIES).index(family(name)), name


def passes_page() -> str:
    """The passes in the order in which they first run, then those that run only on request."""
    return "\n\n".join(_passes()) + "\n"


def _passes() -> Iterator[str]:
    yield "# Passes"
    yield WRITTEN
    yield (
        "The passes of `moec/pipeline.py` in the order in which they first run. `-O0`, `-O1` and "
        "`-O2` are the optimisation levels from which on a pass runs; `--passes -NAME` leaves "
        "one out. `moec list passes` prints this list."
    )
    yield fenced(pipeline.__doc__ or "")
    yield "## In their order"
    reference = {p.name: p for p in _defaults()}
    yield "The file of each begins with what goes in and what comes out, as IR."
    lines = ["| pass | what it does | from | kind | gives | file |", "|---|---|---|---|---|---|"]
    for row in passes():
        options = "" if row["options"] == "-" else f"; options `{row['options']}`"
        file = _file(type(reference[row["pass"]]).__module__)
        facts = (f"`{row['pass']}`", f"{row['what_it_does']}{options}", row["from"], row["kind"])
        lines.append(f"| {' | '.join(facts)} | {row['gives']} | `{file}` |")
    yield "\n".join(lines)
    yield "## Opt-in passes"
    yield (
        '`--passes "+NAME(OPTION=VALUE)"` runs one. An approximate pass needs calibration '
        "data and is measured ([Passes that change the model](approximate.md))."
    )
    kinds = {str(kind.name): kind for kind in pipeline.OPT_IN}
    for row in opt_in_passes():
        kind = kinds[row["pass"]]
        yield f"### {row['pass']}"
        yield f"{first_line(kind)}."
        yield f"{row['kind']}; source: {row['source']}; `{_file(kind.__module__)}`"
        if row["fields"]:
            yield "\n".join(f"- `{name}`: {text}" for name, text in map(_field, row["fields"]))


def _field(line: str) -> tuple[str, str]:
    name, _, text = line.partition(": ")
    return name, text


def _defaults() -> Iterator[Any]:
    for phase in (*pipeline.PHASES, pipeline.DECODE):
        yield from phase.passes
    for _, pass_ in pipeline.ON_REQUEST:
        yield pass_


def _file(module: str) -> str:
    """moec.passes.core.x -> passes/core/x.py: the path in the repository."""
    parts = module.split(".")
    linked = len(parts) > 1 and parts[1] in ("passes", "codegen", "runtime")
    return "/".join(parts[1:] if linked else parts) + ".py"


def formats_page() -> str:
    """The page on checkpoints, with its table."""
    return _with_table("formats.md", formats())


def api_page() -> str:
    """The page on the Python interface, with the table of the options of `moec.compile`."""
    rows = [
        {
            "option": f"`{name}`",
            "command line": " ".join(f"`{flag}`" for flag in option.flags.split()),
            "default": f"`{option.default!r}`",
            "what it does": option.says.replace("|", "\\|"),
            "also of": ", ".join(
                f"`{door}`"
                for door, takes in (("compile_ranks", option.ranks), ("optimize", option.optimize))
                if takes
            ),
        }
        for name, option in compile_options().items()
    ]
    return _with_table("api.md", rows)


def _with_table(name: str, rows: Sequence[Mapping[str, str]]) -> str:
    """The page, with the rows as its table."""
    page = (FOLDER / name).read_text(encoding="utf-8")
    before, _, rest = page.partition(WRITTEN)
    _, _, after = rest.partition(END)
    table = [" | ".join(column.replace("_", " ") for column in rows[0])]
    table.append(" | ".join("---" for _ in rows[0]))
    table += [" | ".join(row.values()) for row in rows]
    lines = "\n".join(f"| {line} |" for line in table)
    return f"{before}{WRITTEN}\n\n{lines}\n\n{END}{after}"


PAGES = {
    "ops.md": ops_page,
    "passes.md": passes_page,
    "formats.md": formats_page,
    "api.md": api_page,
}

if __name__ == "__main__":
    for page, text in PAGES.items():
        (FOLDER / page).write_text(text(), encoding="utf-8")
