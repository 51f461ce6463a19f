"""`moec list passes|targets|models`."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from moec.commands.options import OneOf, json_option

if TYPE_CHECKING:
    from moec.target.cuda import CudaTarget

_NAMES = {"pass", "gives", "target", "model", "class"}
"""Columns that stay whole: people copy and search what is in them."""


@click.command("list", short_help="List passes, targets or models.")
@click.argument("what", type=OneOf(["passes", "targets", "models"]))
@json_option
def command(what: str, as_json: bool) -> None:
    """List the passes in their order, the targets, or the models known to work."""
    rows = {"passes": passes, "targets": targets, "models": models}[what]()
    asked_for = wanted() if what == "passes" else []
    if as_json:
        click.echo(json.dumps(rows + asked_for, indent=1))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from moec.report.text import terminal_width

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), overflow="fold", no_wrap=column in _NAMES)
    for row in rows:
        table.add_row(*(str(cell) for cell in row.values()))
    console = Console(width=terminal_width(), highlight=False, emoji=False)
    console.print(table)
    if asked_for:
        from rich.padding import Padding

        console.print("\nThese run only where they are asked for. Those that change the model need")
        console.print(
            'data, as --passes "+prune-experts(keep=0.5,by=usage)" --calib FILE, or in Python'
        )
        console.print("moec.transform(model, passes, calib=...), which gives a module that trains:")
    for row in asked_for:
        console.print(f"\n[bold]{row['pass']}[/bold]  {row['kind']}")
        lines = [row["what_it_does"], *row["fields"], f"source: {row['source']}"]
        for line in lines:
            console.print(Padding(line, (0, 0, 0, 2)), markup=False)


def wanted() -> list[dict[str, Any]]:
    """One row a pass that runs where it is asked for: what it does, its options, its source."""
    from moec.passes.core.options import default, expected
    from moec.passes.core.runner import Kind
    from moec.pipeline import EXACT_OPT_IN, OPT_IN

    exact = {kind for kind in EXACT_OPT_IN if vars(kind).get("kind") is not Kind.CHANGES}
    return [
        {
            "pass": kind.name,
            "gives": "MOE",
            "from": "asked for",
            "kind": "exact" if kind in exact else "approximate",
            "what_it_does": first_line(kind),
            "options": ", ".join(map(default, fields(kind))) or "-",  # type: ignore[arg-type]
            "fields": [
                f"{default(f)}: {f.metadata['says']} ({expected(f, kind)})"
                for f in fields(kind)  # type: ignore[arg-type]
            ],
            "source": kind.source,
        }
        for kind in OPT_IN
    ]


def passes() -> list[dict[str, Any]]:
    """One row a pass: the first line of its class, what may be set."""
    from moec.passes.core.runner import Kind
    from moec.pipeline import DECODE, ON_REQUEST, PHASES

    leveled = [pair for phase in (*PHASES, DECODE) for pair in phase.leveled]
    level: dict[str, str] = {p.name: option for option, p in ON_REQUEST}
    for at, p in leveled:
        level[p.name] = min(f"-O{at}", level.get(p.name, f"-O{at}"))
    every = (*(p for _, p in leveled), *(p for _, p in ON_REQUEST))
    return [
        {
            "pass": p.name,
            "gives": p.gives.name,
            "from": level[p.name],
            "kind": "exact" if p.kind is Kind.EXACT else "approximate",
            "what_it_does": first_line(p),
            "options": ", ".join(f"{f.name}={getattr(p, f.name)}" for f in fields(p)) or "-",  # type: ignore[arg-type]
        }
        for p in {p.name: p for p in every}.values()
    ]


def first_line(thing: Any) -> str:
    doc = getattr(thing, "doc", None) or thing.__doc__ or ""
    return str(doc).strip().partition("\n")[0].rstrip(".")


def targets() -> list[dict[str, Any]]:
    from moec.target import cpu, cuda

    host = cpu.host()
    rows = [
        {
            "target": "cpu",
            "here": f"{host.name}, this machine's",
            "lanes": host.vector_lanes,
            "needs": "what this machine has",
        }
    ]
    for t in cpu.TARGETS.values():
        lacking = cpu.missing(t)
        here = f"lacks {' '.join(lacking)}" if lacking else "runs"
        needs = " ".join(t.features) or "nothing"
        rows.append({"target": t.name, "here": here, "lanes": t.vector_lanes, "needs": needs})
    rows.append(
        {
            "target": "llvm:-mcpu=...",
            "here": "by its CPU",
            "lanes": "by its CPU",
            "needs": "what LLVM knows of that CPU",
        }
    )
    rows += [
        {
            "target": t.name,
            "here": gpu_here(t),
            "lanes": 32,
            "needs": f"{t.example} or alike, with {' '.join(t.tensor_cores)}",
        }
        for t in cuda.TARGETS.values()
    ]
    return rows


def gpu_here(target: CudaTarget) -> str:
    """What this machine can do for a GPU target."""
    from moec.target import nvidia

    driver = nvidia.driver()
    gpus = driver.gpus if driver else ()
    here = "its GPU is here" if any(target.runs_on(gpu.capability) for gpu in gpus) else "no GPU"
    return f"compiles; {here}" if nvidia.nvcc() else f"no nvcc; {here}"


def models() -> list[dict[str, Any]]:
    from moec.commands.families import FAMILIES, FORMS

    return [
        *({"model": f.model_type, "class": f.architecture, "what": f.what} for f in FAMILIES),
        *({"model": "any module", "class": form, "what": says} for form, says in FORMS.items()),
    ]
