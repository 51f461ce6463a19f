"""`moec optimize MODEL --calib FILE --memory SIZE --loss LIMIT -o out.moec`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moec.commands.options.files import OutputFile, check_output
from moec.commands.options.options import (
    api_arguments,
    force_option,
    json_option,
    model_options,
    quiet_option,
    report_option,
)
from moec.commands.output.download import local_model
from moec.commands.output.echo import echo
from moec.commands.output.logs import log_options
from moec.commands.output.report import print_json, print_report
from moec.errors import UsageError
from moec.runtime.process.byte_sizes import bytes_of
from moec.runtime.process.threads import shorten_spinning


@click.command("optimize", short_help="Choose the formats of weights for a memory or a quality.")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The artifact to write.")
@click.option(
    "--write-choices", "choices_file", type=OutputFile(".yaml"), metavar="FILE.yaml",
    help="Write what was chosen, for `moec compile --choices`; without -o nothing is compiled.",
)  # fmt: skip
@click.option(
    "--calib", metavar="FILE", required=True,
    help="Data on which damage is measured: inputs by name (.npz, .safetensors), or a text (.txt).",
)  # fmt: skip
@click.option("--memory", metavar="SIZE", help="The most that all weights may take, e.g. 4GiB.")
@click.option(
    "--token-bytes", metavar="SIZE",
    help="The most of them that a token reads: of its experts, and all else but embeddings.",
)  # fmt: skip
@click.option(
    "--loss", metavar="LIMIT", help="kl<=0.02, perplexity<=+1%, perplexity<=12 or error<=0.05."
)
@click.option(
    "--formats", default="int8,int4:32,int4:128", show_default=True, metavar="F,F,…",
    help="The formats to choose from, besides leaving weights as they are.",
)  # fmt: skip
@click.option(
    "--moves", default="formats", show_default=True, metavar="M,M,…",
    help="What may be chosen: formats, prune (fewer experts) and top-k (fewer for each token).",
)  # fmt: skip
@model_options
@report_option
@json_option
@quiet_option
@force_option
@log_options
def command(
    model: str,
    output: Path | None,
    choices_file: Path | None,
    calib: str,
    memory: str | None,
    token_bytes: str | None,
    loss: str | None,
    formats: str,
    moves: str,
    full: bool,
    as_json: bool,
    quiet: bool,
    force: bool,
    revision: str | None,
    **options: Any,
) -> None:
    """Compile MODEL with the format for each product's weights that suits a limit.

    With --memory, of the choices that fit the one that changes the model least; with --loss, of
    those within it the one with the fewest bytes; with both, that one has to fit. Damage is
    measured on the data of --calib, and the result is verified as by `moec compile`.
    """
    if output is None and choices_file is None:
        raise UsageError("give -o OUT.moec, --write-choices FILE.yaml, or both")
    for path in filter(None, (output, choices_file)):
        check_output(path, str(path), force=force)
    if memory is None and token_bytes is None and loss is None:
        raise UsageError("moec optimize needs a limit: give --memory, --token-bytes or --loss")
    for size in filter(None, (memory, token_bytes)):
        bytes_of(size)
    arguments = api_arguments(calib=calib, **options)
    model = local_model(model, revision, quiet or as_json)
    shorten_spinning()
    from moec.commands.output.progress import COMPILE, Progress, hush

    hush()
    with Progress(quiet or as_json, plan={"choose": 60.0, **COMPILE}) as progress:
        progress.phase("start")
        from moec.api import compile as compile_model
        from moec.optimisation.optimize import choice_limits, search
        from moec.passes.approximate.choices.model_choices import describe_choices, write_choices

        limits = choice_limits(memory, token_bytes, loss)
        arguments["progress"] = progress.phase
        choices = search(
            model, formats=formats.split(","), moves=moves.split(","), **arguments
        ).choices(limits)
        if choices_file is not None:
            write_choices(choices, choices_file)
        compiled = None
        if output is not None:
            compiled = compile_model(model, choices=choices, **arguments)
            progress.phase("save")
            compiled.save(output, overwrite=force)
    if compiled is not None:
        if as_json:
            print_json(compiled.report(), output)
        elif not quiet:
            print_report(compiled.report(), full, f"wrote {output}")
    elif as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(choices)).decode())
    elif not quiet:
        echo("\n".join((*describe_choices(choices), f"wrote {choices_file}")))
