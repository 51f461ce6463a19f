"""`moec optimize MODEL --calib FILE --memory SIZE --loss LIMIT -o out.moec`."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec

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
from moec.commands.output.logs import log_options
from moec.commands.output.report import print_report
from moec.errors import UsageError
from moec.runtime.process.threads import shorten_spinning


@click.command("optimize")
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path),
    help="The artifact to write; without it, choices are only reported.",
)  # fmt: skip
@click.option(
    "--write-choices", "choices_file", type=OutputFile(".yaml"), metavar="FILE.yaml",
    help="Write what was chosen, for `moec compile --choices`.",
)  # fmt: skip
@click.option(
    "--pareto", type=OutputFile(".svg", ".png"), metavar="FILE",
    help="Draw loss against bytes: choices for six memories, and each format alone, all measured.",
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
    "--tokens-per-second", type=float, metavar="N",
    help="What the result has to write of one text on this machine, measured.",
)  # fmt: skip
@click.option(
    "--loss", metavar="LIMIT", help="kl<=0.02, perplexity<=+1%, perplexity<=12 or error<=0.05."
)
@click.option(
    "--formats", default="int8,int4:32,int4:128", show_default=True, metavar="F,F,…",
    help="The formats to choose from, besides leaving weights as they are.",
)  # fmt: skip
@click.option(
    "--pin", "pins", multiple=True, metavar="PATTERN=FORMAT",
    help="The format of products whose names match, or unchanged; repeatable.",
)  # fmt: skip
@click.option(
    "--moves", default="formats", show_default=True, metavar="M,M,…",
    help="What may be chosen: formats, expert-formats (of single experts), prune (fewer experts), "
    "merge (similar ones), constant (means of results for a part), shared (no shared expert), "
    "top-k (fewer for each token), threshold (none with a small weight).",
)  # fmt: skip
@click.option(
    "--recover", type=click.IntRange(1), is_flag=False, flag_value=300, metavar="[STEPS]",
    help="Train the routers after the choice, by default for 300 steps on the data of --calib.",
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
    pareto: Path | None,
    calib: str,
    memory: str | None,
    token_bytes: str | None,
    tokens_per_second: float | None,
    loss: str | None,
    formats: str,
    pins: tuple[str, ...],
    moves: str,
    recover: int | None,
    full: bool,
    as_json: bool,
    quiet: bool,
    force: bool,
    revision: str | None,
    **options: Any,
) -> None:
    """Compile MODEL with the format for each product's weights that suits a limit.

    With --memory, --token-bytes or --tokens-per-second, of the choices that fit the one that
    changes the model least; with --loss, of those within it the one with the fewest bytes, which
    has to fit. Damage is measured on the data of --calib, and the result is verified as by `moec
    compile`.
    """
    limited = any((memory, token_bytes, tokens_per_second is not None, loss))
    if not limited and (output or choices_file or not pareto):
        raise UsageError(
            "moec optimize needs a limit: give --memory, --token-bytes, --tokens-per-second or "
            "--loss"
        )
    for path in filter(None, (output, choices_file, pareto)):
        check_output(path, str(path), force=force)
    arguments = api_arguments(calib=calib, **options)
    if pareto:
        importlib.import_module("matplotlib")  # fails now, not after a search of minutes
    model = local_model(model, revision, quiet or as_json)
    shorten_spinning()
    from moec.commands.output.progress import COMPILE, Progress, hush

    hush()
    with Progress(quiet or as_json, plan={"measure": 40.0, "choose": 20.0, **COMPILE}) as progress:
        progress.phase("start")
        from moec.optimise.optimisation.optimize import choice_limits, compile_choices, search
        from moec.optimise.optimisation.pareto import draw_points, pareto_points
        from moec.optimise.optimisation.pinned import split_pinned
        from moec.optimise.optimisation.speed import Compile, choose_fast
        from moec.passes.approximate.choices.model_choices import describe_choices, write_choices

        limits = choice_limits(memory, token_bytes, loss, tokens_per_second) if limited else None
        arguments["progress"] = progress.phase
        searched = search(
            model, formats=formats.split(","), moves=moves.split(","), pin=split_pinned(pins),
            recover=recover or 0, **arguments,
        )  # fmt: skip
        points = pareto_points(searched) if pareto else []
        if pareto:
            draw_points(points, searched.metric, pareto)
        compiled: Compile = partial(compile_choices, model, **arguments)
        fast, report = None, None
        if limits is not None:
            fast = choose_fast(searched, limits, tokens_per_second, compiled)
            if choices_file is not None:
                write_choices(fast.choices, choices_file)
            if output is not None:
                chosen = fast.compiled or compiled(fast.choices)
                progress.phase("save")
                chosen.save(output, overwrite=force)
                report = chosen.report()
    if as_json:
        document: dict[str, Any] = {"pareto": msgspec.to_builtins(points)}
        document |= {} if fast is None else {"choices": msgspec.to_builtins(fast.choices)}
        if fast is not None and fast.tokens_per_second:
            document["tokens_per_second"] = fast.tokens_per_second
        document |= {} if report is None else {**report.to_dict(), "output": str(output)}
        click.echo(json.dumps(document, indent=1))
    elif not quiet:
        if report is not None:
            print_report(report, full, f"wrote {output}")
        lines = [] if fast is None or report is not None else describe_choices(fast.choices)
        lines += [f"{p.choice}: {p.bytes / 1e6:.4g} MB, {p.damage:.3g}" for p in points]
        if fast is not None and fast.tokens_per_second:
            lines.append(f"writes {fast.tokens_per_second:.3g} tokens a second")
        lines += [f"wrote {path}" for path in (choices_file, pareto) if path]
        click.echo("\n".join(lines), nl=bool(lines))
