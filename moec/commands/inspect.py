"""`moec inspect MODEL_OR_ARTIFACT`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec.commands.compilation.compiling import compiling
from moec.commands.execution.ranks import holds_ranks
from moec.commands.options.files import OutputFile
from moec.commands.options.options import api_arguments, json_option, model_options
from moec.commands.output.download import local_model
from moec.commands.output.echo import echo
from moec.commands.output.logs import log_options
from moec.errors import UsageError
from moec.files.gguf import is_gguf, read_header
from moec.files.printable import printable_json
from moec.report.opened import is_artifact, open_artifact
from moec.runtime.package import MAIN

if TYPE_CHECKING:
    from moec.ir.graph import Graph
    from moec.report.report import Report


@click.command("inspect")
@click.argument("model", metavar="MODEL_OR_ARTIFACT")
@click.option(
    "--graph", "picture", type=OutputFile(".dot"), metavar="FILE.dot",
    help="Write the modules of the model for Graphviz, which draws them.",
)  # fmt: skip
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@model_options
@log_options
def command(
    model: str,
    picture: Path | None,
    as_json: bool,
    quiet: bool,
    revision: str | None,
    **options: Any,
) -> None:
    """Show what moec recognises in a model, or what was compiled into an artifact.

    Lists every MoE block with its router, experts and parameters, the sizes of inputs and outputs,
    and every candidate that was not recognised, with the reason. For a folder of the ranks of a
    plan: the plan, and what each rank has.
    """
    if holds_ranks(Path(model)):
        if picture:
            raise UsageError(f"--graph draws one model, and {model} has the ranks of a plan")
        _show_ranks(Path(model), as_json)
        return
    graph: Graph | None = None
    if is_artifact(Path(model)):
        opened = open_artifact(Path(model))
        report, text = opened.report(), opened.graph(MAIN)
        if picture:
            from moec.model.stored import stored_graph

            graph = stored_graph(Path(model), MAIN, text)
    else:
        arguments = api_arguments(**options)
        model = local_model(model, revision, quiet or as_json)
        if is_gguf(Path(model)) and not (quiet or as_json):  # at once: a capture takes seconds
            tensors = read_header(Path(model)).tensors.values()
            counts = Counter(tensor.type for tensor in tensors).most_common()
            echo(f"tensors     {', '.join(f'{count} {kind}' for kind, count in counts)}", err=True)
        report, graph = of_model(model, arguments, quiet or as_json)
    if picture and graph is not None:
        from moec.report.picture.dot import save
        from moec.report.picture.scene import scene

        save(scene(report.model, graph, report.blocks, report.declined), picture)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
        return
    from moec.report.text import render, terminal_width

    click.echo(render(report, terminal_width(), color=sys.stdout.isatty()), nl=False)
    if picture:
        echo(f"\ndrew {picture}")


def _show_ranks(folder: Path, as_json: bool) -> None:
    """The plan, and what each rank has."""
    import msgspec

    from moec.files.printable import columns
    from moec.parallel.store import read_plan
    from moec.plan.plan import show
    from moec.report.units import size

    plan, ranks = read_plan(folder)
    if as_json:
        facts = {"plan": msgspec.to_builtins(plan), "ranks": [asdict(rank) for rank in ranks]}
        click.echo(printable_json(json.dumps(facts, indent=1)))
        return
    echo(show(plan))
    lines = [("rank", "weights", "functions")]
    lines += [(str(r.rank), size(r.weights), ", ".join(r.functions)) for r in ranks]
    echo("\n".join(line.rstrip() for line in columns(lines)))


def of_model(model: str, arguments: Mapping[str, Any], quiet: bool) -> tuple[Report, Graph]:
    """Capture a model and recognise its blocks, without generating code. `arguments` are those of
    `moec.compile`."""
    with compiling(quiet) as (compile_model, _):
        compiled = compile_model(model, **arguments, verify=False, stop_after="recognise")
    report = compiled.report()
    return replace(report, phases={}, target=""), compiled.pass_results[-1].program.graph
