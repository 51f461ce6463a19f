"""`moec eval MODEL_OR_ARTIFACT [...]`: quality, beside a reference."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moec.commands.options.options import json_option, quiet_option
from moec.commands.output.echo import echo
from moec.errors import SetupError, UsageError
from moec.files.os_errors import reason
from moec.files.printable import printable_json
from moec.files.regular_file import read_regular

FILE = click.Path(path_type=Path)


@click.command("eval")
@click.argument("models", nargs=-1, required=True, metavar="MODEL_OR_ARTIFACT...")
@click.option("--text", type=FILE, metavar="FILE", help="Text that the models are to predict.")
@click.option(
    "--tasks", type=FILE, metavar="FILE.jsonl",
    help="Multiple choice: query, choices and gold (the index of the right one) in each line.",
)  # fmt: skip
@click.option(
    "--window", type=click.IntRange(min=2), default=512, show_default=True,
    help="Tokens of a call.",
)  # fmt: skip
@click.option(
    "--stride", type=click.IntRange(min=1),
    help="Tokens between two windows, of which only these are counted; default: half a window.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1, 4096), help="Threads of the kernels; default: one per core."
)
@json_option
@quiet_option
def command(
    models: tuple[str, ...],
    text: Path | None,
    tasks: Path | None,
    window: int,
    stride: int | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how well models predict a text, how far they are from the first of them, and how
    often they choose right.

    A model is an artifact, or a folder with a checkpoint or a .gguf file, which run in eager
    PyTorch. Intervals take windows, and tasks, as independent samples.
    """
    if text is None and tasks is None:
        raise UsageError("give --text FILE, --tasks FILE.jsonl, or both")
    from moec.commands.output.progress import Progress, hush
    from moec.runtime.process.threads import set_threads, shorten_spinning

    shorten_spinning()
    set_threads(threads)
    hush()
    content = None if text is None else _read(text)
    with Progress(quiet or as_json) as progress:
        from moec.optimise.evaluation.evaluate import evaluate

        result = evaluate(
            models, content, tasks, window=window, stride=stride, progress=progress.phase
        )
    if as_json:
        click.echo(printable_json(json.dumps(result.to_dict(), indent=1)))
    else:
        echo(str(result), nl=False)


def _read(path: Path) -> str:
    try:
        return read_regular(path).decode()
    except OSError as error:
        raise SetupError(f"{path}: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise SetupError(f"{path} is not UTF-8 at byte {error.start}: convert it first") from error
