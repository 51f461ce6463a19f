"""`moec bisect MODEL`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

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
from moec.runtime.process.threads import shorten_spinning


@click.command("bisect", short_help="Find the first rewrite that changes a model's numbers.")
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
@click.pass_context
@log_options
def command(
    ctx: click.Context,
    model: str,
    tolerance: float | None,
    seed: int,
    as_json: bool,
    quiet: bool,
    shapes: tuple[str, ...],
    dtype: str | None,
    opt_level: int,
    passes: str,
    allow_fixed: tuple[str, ...],
    constants: tuple[str, ...],
    revision: str | None,
    adapters: tuple[str, ...],
) -> None:
    """Find the first rewrite of the passes that changes what MODEL computes.

    Every graph between capture and code is run in eager PyTorch on random inputs. Exits with
    0 where all agree with the captured graph, and with 2 where one does not.
    """
    from moec.commands.options.shapes import explain_sizes
    from moec.commands.output.progress import Progress, hush

    check_changes(passes)
    arguments = api_arguments(
        shapes,
        dtype=dtype,
        allow_fixed=allow_fixed,
        constants=constants,
        adapters=adapters,
    )
    model = local_model(model, revision, quiet or as_json)
    shorten_spinning()
    hush()
    with explain_sizes(), Progress(quiet=quiet or as_json) as progress:
        progress.phase("capture")
        from moec import compile as compile_model
        from moec.interpret.run_in_float32 import MEANING
        from moec.model.bind_inputs import bound
        from moec.pipeline import choose, exact
        from moec.verify.bisect import bisect, drawn_cases

        why = (
            "bisect searches exact rewrites, and this pass changes numbers on purpose: leave it out"
        )
        chosen = exact(choose(opt_level, passes), why)
        compiled = compile_model(
            model,
            **arguments,
            stop_after="capture",
            progress=progress.phase,
        )
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
    ctx.exit(2 if bisection.culprit else 0)
