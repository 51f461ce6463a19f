"""`moec profile ARTIFACT`: where the time of its calls goes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import click

from moec.commands.options.files import OutputFile
from moec.commands.options.options import json_option, quiet_option
from moec.commands.output.echo import echo
from moec.errors import UsageError


@click.command("profile")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "-i", "--input", "source", type=click.Path(path_type=Path), metavar="FILE",
    help="Profile a call with these inputs (.npz, .safetensors, .npy), instead of text.",
)  # fmt: skip
@click.option("--prompt", metavar="TEXT", help="Profile this text and its likeliest continuation.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True,
    help="Without --prompt: the number of random tokens.",
)  # fmt: skip
@click.option("--new-tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--threads", type=click.IntRange(1, 4096), help="Threads of the kernels; default: one per core."
)
@click.option(
    "--trace", type=OutputFile(".json"), metavar="FILE.json",
    help="Write the calls of the last round as a trace for ui.perfetto.dev or chrome://tracing.",
)  # fmt: skip
@click.option(
    "--plot", type=OutputFile(".png", ".svg", ".pdf"), metavar="FILE",
    help="Draw the speed of kernels under the machine's limits as a .png, .svg or .pdf.",
)  # fmt: skip
@json_option
@quiet_option
def command(
    artifact: Path,
    source: Path | None,
    prompt: str | None,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    threads: int | None,
    trace: Path | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time each kernel of ARTIFACT, in prefill and decode.

    The model runs in turn as it always runs, and with a clock around its kernels; both times are
    shown. Work (FLOPs and bytes) is shown beside the machine's limits, which are measured too.
    """
    if source is not None and prompt is not None:
        raise UsageError("--input and --prompt cannot be combined: leave one out")
    if plot:
        importlib.import_module("matplotlib")  # fails now, not after the run
    from moec.runtime.process.threads import set_threads

    set_threads(threads)
    from moec.commands.output.progress import Progress, hush
    from moec.model.load import load

    hush()
    with Progress(quiet=quiet or as_json) as progress:
        progress.phase("open the model")
        model = load(artifact)
        inputs = None
        if source is not None:
            from moec.runtime.arrays.tensor_files import read_tensors

            inputs = read_tensors(source, model.artifact.package.main.inputs)
        profile = model.profile(
            prompt,
            inputs,
            batch=batch,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            progress=progress.phase,
        )
    if trace:
        trace.write_text(json.dumps(profile.trace()), encoding="utf-8")
    if plot:
        profile.plot(plot)
    click.echo(json.dumps(profile.to_dict(), indent=1) if as_json else str(profile))
    for path in (trace, plot):
        if path and not as_json:
            echo(f"wrote {path}")
