"""`moec bisect MODEL`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from moec.commands.compilation.compiling import compiling
from moec.commands.options.options import (
    Tolerance,
    api_arguments,
    check_changes,
    json_option,
    model_options,
)
from moec.commands.output.download import local_model
from moec.commands.output.echo import echo
from moec.commands.output.logs import log_options
from moec.errors import Exit


@click.command("bisect")
@click.argument("model")
@click.option(
    "--tolerance", type=Tolerance(), help="Greatest relative error allowed; default: 2e-4."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the random inputs.",
)
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@model_options
@log_options
def command(
    model: str,
    tolerance: float | None,
    seed: int,
    as_json: bool,
    quiet: bool,
    opt_level: int,
    passes: str,
    revision: str | None,
    **options: Any,
) -> None:
    """Find the first rewrite of the passes that changes what MODEL computes.

    Every graph between capture and code is run in eager PyTorch on random inputs. Exits with
    0 where all agree with the captured graph, and with 2 where one does not.
    """
    check_changes(passes)
    arguments = api_arguments(**options)
    model = local_model(model, revision, quiet or as_json)
    with compiling(quiet or as_json) as (compile_model, progress):
        from moec.ir.interpret.run_in_float32 import MEANING
        from moec.model.bind_inputs import bound
        from moec.pipeline import choose, exact
        from moec.verify.bisect import bisect, drawn_cases

        why = (
            "bisect searches exact rewrites, and this pass changes numbers on purpose: leave it out"
        )
        chosen = exact(choose(opt_level, passes), why)
        compiled = compile_model(model, **arguments, stop_after="capture")
        with compiled.source.memory.reading():
            captured = bound(compiled.captured, chosen)
            progress.phase("passes")
            bisection = bisect(
                captured.program,
                chosen,
                drawn_cases(captured, seed),
                tolerance=MEANING if tolerance is None else tolerance,
                progress=progress.phase,
            )
    if as_json:
        click.echo(json.dumps(asdict(bisection), indent=1))
    else:
        echo(str(bisection))
    click.get_current_context().exit(Exit.DIFFERS if bisection.culprit else Exit.RIGHT)
