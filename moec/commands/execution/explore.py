"""`moec explore ARTIFACT|MODEL`: a page to look inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec.commands.compilation.compiling import compiling
from moec.commands.execution.ranks import holds_ranks
from moec.commands.options.files import OutputFile
from moec.commands.options.options import (
    api_arguments,
    changing_options,
    check_only,
    model_options,
    quiet_option,
)
from moec.commands.output.download import local_model
from moec.commands.output.echo import echo
from moec.errors import UsageError
from moec.report.opened import is_artifact

if TYPE_CHECKING:
    from moec.model.compiled import CompiledModel

FILE = click.Path(path_type=Path, dir_okay=False)
OF_ARTIFACTS = ("model", "trace", "profile", "plan", "output", "port", "quiet")


@click.command("explore")
@click.argument("model", metavar="ARTIFACT|MODEL")
@click.option(
    "--trace", type=FILE, metavar="FILE.npz",
    help="Show this routing, which `moec run --record-routing` recorded of the model.",
)  # fmt: skip
@click.option(
    "--profile", type=FILE, metavar="FILE.json",
    help="Show these times of kernels, which `moec profile --json` printed of the artifact.",
)  # fmt: skip
@click.option(
    "--plan", type=FILE, metavar="FILE.json", help="Show this plan, which `moec plan -o` wrote."
)  # fmt: skip
@click.option(
    "-o", "--output", type=OutputFile(".html"), metavar="FILE.html",
    help="Write the page to a file, instead of serving it.",
)  # fmt: skip
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0,
    help="Serve at this port of 127.0.0.1; default: a free one.",
)  # fmt: skip
@quiet_option
@model_options
@changing_options
def command(
    model: str,
    trace: Path | None,
    profile: Path | None,
    plan: Path | None,
    output: Path | None,
    port: int,
    quiet: bool,
    revision: str | None,
    **options: Any,
) -> None:
    """Show a page to look inside ARTIFACT, or MODEL after all passes.

    The page has the graph after each pass beside the one before (of an artifact, the last graphs),
    the user's line of each op, blocks that were recognised or declined with the reasons, kernels,
    and weights. It needs nothing else: no network and no other file. It is served on 127.0.0.1
    until Ctrl-C, or written to a file.

    --quant and approximate passes (--passes, --calib, --budget) change MODEL as in `moec compile`.
    """
    if output and click.get_current_context().get_parameter_source("port") != DEFAULT:
        raise UsageError("-o writes the page and --port serves it: leave one out")
    if holds_ranks(Path(model)):
        raise UsageError(f"{model} has the ranks of a plan: explore the model, with --plan")
    files = {"trace": trace, "profile": profile, "plan": plan}
    if is_artifact(Path(model)):
        check_only(OF_ARTIFACTS, f"is of models, and {model} is an artifact: leave it out")
        from moec.inspect.exploration.explore import explore

        html = explore(model, **files)
    else:
        arguments = api_arguments(**options)
        compiled = _compile(local_model(model, revision, quiet), arguments, quiet)
        from moec.inspect.exploration.explore import explore

        html = explore(compiled, **files)
    if output is None:
        from moec.inspect.exploration.serve import serve

        serve(html, port, lambda address: echo(f"{address}  (Ctrl-C ends)"))
        return
    output.write_text(html, encoding="utf-8")
    if not quiet:
        echo(f"wrote {output}")


DEFAULT = click.core.ParameterSource.DEFAULT


def _compile(model: str, arguments: Mapping[str, Any], quiet: bool) -> CompiledModel:
    """The model after all passes, without code. As `moec inspect`, it does not observe the modules
    that no rule recognised, which can take minutes."""
    from moec.commands.output.progress import BEFORE_CODE, COMPILE

    plan = {name: COMPILE[name] for name in BEFORE_CODE}
    with compiling(quiet, plan) as (compile_model, _):
        from moec.ir.formats.notation import parse_parts
        from moec.pipeline import choose, quantising

        passes = choose(arguments["opt_level"], arguments["passes"])
        if quant := arguments["quant"]:
            passes = (*passes, *quantising(parse_parts(quant)))
        return compile_model(model, **arguments, verify=False, stop_after=passes[-1].name)
