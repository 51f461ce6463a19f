"""`moec bench MODEL`: tokens per second, compared with others and with the machine's limits."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec import model_path
from moec.commands.execution.bench_serve import ServeOptions, print_served, serve_options
from moec.commands.options.files import OutputFile
from moec.commands.options.options import (
    DTypeName,
    check_changes,
    json_option,
    revision_option,
)
from moec.commands.output.download import local_model
from moec.commands.output.echo import echo
from moec.errors import UsageError
from moec.files.hub_files import short_name
from moec.inspect.bench.names import PACKAGES, check_names, files_of
from moec.report.opened import is_artifact
from moec.target.cpu import processor

if TYPE_CHECKING:
    from moec.runtime.artifact.artifact import Artifact


@click.command("bench")
@click.argument("model", metavar="MODEL_OR_ARTIFACT", required=False)
@serve_options
@click.option(
    "--artifact", type=click.Path(path_type=Path), metavar="FILE",
    help="Time this artifact, which was compiled from MODEL, instead of compiling MODEL.",
)  # fmt: skip
@click.option(
    "--baseline", default="", metavar="NAMES",
    help="Compare with eager, grouped_mm, batched_mm, inductor (for a checkpoint folder), or "
    "with onnxruntime, openvino, llama.cpp (each with a --file).",
)  # fmt: skip
@click.option(
    "--file", "files", type=click.Path(path_type=Path, dir_okay=False), multiple=True,
    metavar="FILE", help="The file that a baseline runs: an .onnx with a KV cache, or a .gguf.",
)  # fmt: skip
@revision_option
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--dtype", type=DTypeName(), help="Convert the weights first, e.g. bf16.")
@click.option("--quant", metavar="FORMAT", help="As in moec compile; baselines are not quantised.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads of moec and of every baseline; default: one per core.",
)
@click.option(
    "--plot",
    type=OutputFile(".png", ".svg", ".pdf"),
    metavar="FILE",
    help="Draw the result as a .png, .svg or .pdf.",
)
@click.option(
    "--append", type=OutputFile(), metavar="FILE",
    help="Add the result and the command to this Markdown file.",
)  # fmt: skip
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def command(
    model: str | None,
    artifact: Path | None,
    baseline: str,
    files: tuple[Path, ...],
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    dtype: str | None,
    quant: str | None,
    threads: int | None,
    plot: Path | None,
    append: Path | None,
    as_json: bool,
    quiet: bool,
    revision: str | None,
    **serving: Any,
) -> None:
    """Time prefill and decode of MODEL_OR_ARTIFACT.

    All contenders run in one process on the same tokens, in turn in every round, so that other load
    of the machine affects all of them. The machine's peak FLOP/s and bandwidth are measured too.

    With --serve a server is loaded: time to the first token, between tokens and to the end as
    percentiles, for each load.
    """
    served = ServeOptions(**serving)
    if plot:
        importlib.import_module("matplotlib")  # fails now, not after a run of minutes
    if served.server:
        if model is not None:
            raise UsageError("--serve is about a server: leave MODEL_OR_ARTIFACT out")
        print_served(served, prompt_tokens, new_tokens, threads, plot, as_json, quiet)
        return
    if model is None:
        raise UsageError("name a model or an artifact to time")
    names = [name.strip() for name in baseline.split(",") if name.strip()]
    check_names(names)
    files_of([name for name in names if name in PACKAGES], files)
    opened = _artifact_of(model, artifact, names, quant)
    if opened is None or any(name not in PACKAGES for name in names):
        model = local_model(model, revision, quiet or as_json)
    from moec.runtime.process.threads import set_threads

    count = set_threads(threads)
    from moec.commands.output.progress import Progress, hush

    hush()
    with Progress(quiet=quiet or as_json) as progress:
        report = _bench(
            model,
            opened,
            names,
            files,
            (batch, prompt_tokens, new_tokens, rounds),
            dtype,
            quant,
            count,
            progress.phase,
        )
    if plot:
        from moec.inspect.bench.result import plot as draw

        draw(report, plot)
    if append:
        with append.open("a", encoding="utf-8") as file:
            file.write(report.section(_command()))
    click.echo(json.dumps(report.to_dict(), indent=1) if as_json else str(report))
    if plot and not as_json:
        echo(f"drew {plot}")


def _artifact_of(
    model: str, artifact: Path | None, names: Sequence[str], quant: str | None
) -> Path | None:
    """The artifact to time; None where `model` is to be compiled. Raises UsageError for options
    that exclude one another."""
    check_changes(quant=quant)
    path = Path(model)
    of_artifact = is_artifact(path)
    if quant and (artifact or of_artifact):
        raise UsageError(
            "--quant is for a model that is compiled here; an artifact is quantised "
            "when it is compiled"
        )
    if of_artifact and (artifact or any(name not in PACKAGES for name in names)):
        raise UsageError(
            f"{model} is an artifact: give the checkpoint that it was compiled from, and "
            f"--artifact {model}"
        )
    return path if of_artifact else artifact


def _command() -> str:
    """The command line, with the names of files and folders instead of their paths."""
    words = sys.argv[1:] if Path(sys.argv[0]).stem in ("moec", "__main__") else []
    named = [Path(word).name if "/" in word else word for word in words]
    return shlex.join(["moec", *named])


def _bench(
    model: str,
    artifact: Path | None,
    names: list[str],
    files: Sequence[Path],
    numbers: tuple[int, int, int, int],
    dtype: str | None,
    quant: str | None,
    threads: int,
    progress: Any,
) -> Any:
    import torch

    from moec.inspect.bench import contenders, of_files
    from moec.inspect.bench.race import Load, race
    from moec.inspect.bench.result import MeasuredLimits, result
    from moec.ir.text import parse
    from moec.report.profile import limits
    from moec.report.profile.cost import cost
    from moec.runtime.package import DECODE

    torch.set_num_threads(threads)
    before = os.getloadavg()[0]
    progress("open the model")
    package, executor, text = _open(model, artifact, dtype, quant, progress)
    ours = contenders.compiled(executor)
    generation, (logits,) = package.generation, package.functions[DECODE].outputs
    batch, prompt, new, rounds = numbers
    if generation.longest is not None and prompt + new > generation.longest:
        raise UsageError(
            f"{prompt} + {new} tokens are requested, and the model takes at most "
            f"{generation.longest}: give smaller numbers"
        )
    load = Load(batch, prompt, new, generation.vocabulary)
    with_files = [name for name in names if name in PACKAGES]
    others = [
        *contenders.transformers(
            [name for name in names if name not in PACKAGES], lambda: load_eager(model, dtype)
        ),
        *of_files.of_files(with_files, files, threads),
    ]
    graph = parse(text)
    kind = "bfloat16" if logits.dtype == "bf16" else "float32"

    def measure() -> tuple[float, float]:
        progress("measure the machine")
        return limits.peak(kind), limits.bandwidth()

    # The speed of shared machines varies: the limit is the better of one measured before and after.
    first = measure()
    times = race([ours, *others], load, rounds, progress)
    second = measure()
    peak, stream = max(first[0], second[0]), max(first[1], second[1])
    sizes = {"B": batch, "Q": 1, "L": prompt + new}

    def least(tokens: int, context: int) -> float:
        needed = cost(graph, sizes | {"S": tokens}, context)
        return max(needed.flops / peak, needed.bytes / stream)

    return result(
        Path(short_name(Path(model))).name,
        logits.dtype,
        f"{processor()}, {platform.machine()}",
        threads,
        _versions(with_files),
        load,
        MeasuredLimits(kind, peak, stream, least(prompt, prompt), least(1, prompt + new // 2)),
        times,
        before,
    )


def _versions(baselines: Sequence[str]) -> dict[str, str]:
    """The versions of the packages that take part, where they are installed."""
    from moec.commands.machine import installed_version

    names = ("moec", "torch", "apache-tvm", "transformers", *map(PACKAGES.__getitem__, baselines))
    return {name: version for name in names if (version := installed_version(name))}


def _open(
    model: str, artifact: Path | None, dtype: str | None, quant: str | None, progress: Any
) -> Any:
    from moec.ir.text import print_graph
    from moec.runtime.package import DECODE

    if artifact is None:
        from moec import compile as compile_model

        compiled = compile_model(model, dtype=dtype, quant=quant, verify=False, progress=progress)
        programs = compiled.programs
        text = print_graph(programs[DECODE].graph) if DECODE in programs else ""
        return compiled.package, compiled.executor, text
    from moec.runtime.artifact.artifact import read
    from moec.runtime.call.executor import start

    opened: Artifact = read(artifact)
    return opened.package, start(opened), opened.graphs.get(DECODE, "")


def load_eager(model: str, dtype: str | None) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from moec.capture.hub import own_config

    model_path.kind_of_model(model)  # with --artifact, nothing else has looked at its files
    return AutoModelForCausalLM.from_pretrained(
        model,
        dtype=getattr(torch, dtype) if dtype else "auto",
        use_safetensors=True,
        config=own_config(Path(model)),
        local_files_only=True,
    )
