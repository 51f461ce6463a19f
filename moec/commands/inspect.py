"""`moec inspect MODEL_OR_ARTIFACT`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec.commands.execution.ranks import holds_ranks
from moec.commands.options.files import OutputFile
from moec.commands.options.options import api_arguments, json_option, model_options
from moec.commands.output.download import local_model
from moec.commands.output.echo import echo
from moec.commands.output.logs import log_options
from moec.errors import ArtifactError, UsageError
from moec.files.printable import printable_json

if TYPE_CHECKING:
    from moec.ir.graph import Graph
    from moec.report.report import Report


@click.command("inspect", short_help="Show the MoE blocks of a model or an artifact.")
@click.argument("model", metavar="MODEL_OR_ARTIFACT")
@click.option(
    "--graph", "picture", type=OutputFile(".svg", ".html", ".dot"), metavar="FILE",
    help="Draw the model as .svg, .html or .dot.",
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
        report, text = of_artifact(Path(model))
        if picture:
            graph = _graph(Path(model), text)
    else:
        arguments = api_arguments(**options)
        model = local_model(model, revision, quiet or as_json)
        report, graph = of_model(model, arguments, quiet or as_json)
    if picture and graph is not None:
        from moec.report.picture import save, scene

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

    from moec.parallel.store import read_plan
    from moec.plan.report.text import columns, show
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


def is_artifact(path: Path) -> bool:
    """Whether it is an artifact: a folder with a manifest, or a .moec file."""
    if path.is_dir():
        return (path / "manifest.json").is_file()
    return path.is_file() and path.suffix == ".moec"


def of_artifact(path: Path) -> tuple[Report, str]:
    """The report stored in an artifact, and the text of its graph. Works without the compiler, and
    for artifacts for other machines.

    Raises ArtifactError where the parts that are read here are missing or altered.
    """
    from moec.report.report import Report
    from moec.runtime.artifact import manifest as manifests
    from moec.runtime.artifact.artifact import graph_part
    from moec.runtime.artifact.container import open_container
    from moec.runtime.package import MAIN

    container = open_container(path)
    manifest = manifests.load(_verified(path, container, manifests.NAME, None))
    recorded = manifest.extra.get("report")
    if not isinstance(recorded, Mapping):
        raise ArtifactError(f"{path} has no report; compile it again with this version of moec")
    part = graph_part(MAIN)
    if part not in manifest.parts:
        raise ArtifactError(f"{path} holds no {part}; compile or copy the artifact again")
    text = _verified(path, container, part, manifest.parts[part].sha256)
    report = Report.of_dict(recorded)
    packed = sum(part.size for name, part in manifest.parts.items() if name.startswith("weights/"))
    return replace(report, bytes_out=packed, phases={}), bytes(text).decode(errors="replace")


def _graph(path: Path, text: str) -> Graph:
    from moec.model.stored import stored_graph
    from moec.runtime.package import MAIN

    return stored_graph(path, MAIN, text)


def _verified(path: Path, container: Mapping[str, Any], name: str, sha256: str | None) -> Any:
    content = container.get(name)
    if content is None:
        raise ArtifactError(f"{path} is not a moec artifact: it has no {name}")
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise ArtifactError(
            f"{path}: {name} was changed after it was written; compile or copy the artifact again"
        )
    return content


def of_model(model: str, arguments: Mapping[str, Any], quiet: bool) -> tuple[Report, Graph]:
    """Capture a model and recognise its blocks, without generating code. `arguments` are those of
    `moec.compile`."""
    from moec.commands.options.shapes import explain_sizes
    from moec.commands.output.progress import Progress, hush

    hush()
    with explain_sizes(), Progress(quiet=quiet) as progress:
        progress.phase("start")
        from moec import compile as compile_model

        compiled = compile_model(
            model,
            **arguments,
            verify=False,
            stop_after="recognise",
            progress=progress.phase,
        )
    report = compiled.report()
    return replace(report, phases={}, target=""), compiled.pass_results[-1].program.graph
