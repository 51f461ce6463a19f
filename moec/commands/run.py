"""`moec run ARTIFACT`: runs a compiled model on tensors or text, without torch and the compiler."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec.commands.compilation.cached_model import artifact_of
from moec.commands.execution.memory import limit_of, start_limited, store_answer
from moec.commands.execution.ranks import holds_ranks, run_ranks
from moec.commands.execution.text import TextOptions, read_prompts, text_options, write_texts
from moec.commands.options.files import check_writable
from moec.commands.options.options import (
    json_option,
    memory_option,
    quiet_option,
    signed_by_option,
)
from moec.commands.output.echo import echo
from moec.commands.output.logs import log_options
from moec.errors import Exit, SetupError, UsageError, VerificationError

if TYPE_CHECKING:
    from moec.runtime.artifact.artifact import Artifact
    from moec.runtime.call.executor import Executor


@click.command("run")
@click.argument("artifact", type=click.Path(path_type=Path))
@memory_option
@text_options
@click.option(
    "-i", "--input", "source", type=click.Path(path_type=Path), metavar="FILE",
    help="The inputs by name (.npz, .safetensors), or a single input (.npy).",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE",
    help="Write the outputs by name (.npz with bf16 as float32, .safetensors), or a single "
    "output (.npy).",
)  # fmt: skip
@click.option(
    "--check", is_flag=True, help="Compare with the stored samples; exit 4 if they differ."
)
@click.option(
    "--record-routing", "trace", type=click.Path(path_type=Path), metavar="FILE.npz",
    help="Write the experts that each token chose, for moec routing and moec plan.",
)  # fmt: skip
@click.option(
    "--device", default=None, metavar="DEVICE",
    help="cpu, cuda or cuda:1; default: cpu if the artifact has code for it.",
)  # fmt: skip
@signed_by_option
@click.option(
    "--rebuild",
    is_flag=True,
    help="Compile the stored graph on this machine instead of using the stored code.",
)
@click.option(
    "--threads", type=click.IntRange(1, 4096), help="Threads of the kernels; default: one per core."
)
@click.option(
    "--nproc", type=click.IntRange(min=1), metavar="N",
    help="Run the N ranks of moec compile --plan on this host; for several hosts use torchrun.",
)  # fmt: skip
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=60.0, show_default=True,
    help="Seconds that a rank waits for the other ranks.",
)  # fmt: skip
@click.option(
    "--routing", type=click.Path(path_type=Path), metavar="FILE.npz",
    help="With --memory: recorded routing, by which the experts that stay in memory are chosen.",
)  # fmt: skip
@json_option
@quiet_option
@log_options
def command(
    artifact: Path,
    source: Path | None,
    output: Path | None,
    check: bool,
    trace: Path | None,
    device: str | None,
    signed_by: Path | None,
    rebuild: bool,
    threads: int | None,
    nproc: int | None,
    timeout: float,
    memory: str | None,
    routing: Path | None,
    as_json: bool,
    quiet: bool,
    **text: Any,
) -> None:
    """Run ARTIFACT on the tensors in a file, or continue prompts with it.

    In its place, a checkpoint's folder, a .gguf file or ORG/NAME of the hub is compiled into the
    cache, if it is not there, and verified.

    Outputs are summarised on stdout, or written with --output. The continuation of a prompt is
    printed as it is computed. Exit code 4 means that --check found a difference.
    """
    options = TextOptions(**text)
    if nproc is None and not holds_ranks(artifact):
        _check_work(source, output, options, compares=check or rebuild)
        artifact = artifact_of(artifact, quiet or as_json)
    if holds_ranks(artifact):
        _check_ranks(artifact, rebuild, alone=bool(check or trace or device or memory))
        run_ranks(
            artifact, source, output, options, nproc, timeout, threads, as_json, quiet, signed_by
        )
        return
    if nproc is not None:
        raise UsageError(f"--nproc: {artifact} is for one process; moec compile --plan makes ranks")
    from moec.runtime.arrays.tensor_files import check_suffix
    from moec.runtime.artifact import artifact as artifacts
    from moec.runtime.call.executor import start
    from moec.runtime.device.device import default_device, device_of, only_for
    from moec.runtime.process.threads import set_threads

    set_threads(threads)
    limit = limit_of(memory, routing)
    prompts = read_prompts(options)
    for path in (source, output):
        if path is not None:
            check_suffix(path)
    if trace is not None:
        check_trace(trace)
    on = None if device is None else device_of(device, copies=True)
    started = time.perf_counter()
    opened = artifacts.read(artifact, native=not rebuild, signed_by=signed_by)
    on = on or default_device(opened.package, copies=True)
    opened = only_for(opened, on)
    if rebuild:  # imports the compiler, which is slow and rarely needed
        from moec.model.rebuild import rebuild as recompile

        opened = replace(opened, package=recompile(opened))
    texts = (options.batch if options.prompts else 1) * options.beams
    executor = (
        start(opened, on) if limit is None else start_limited(opened, limit, trace, routing, texts)
    )
    answer: dict[str, Any] = {"artifact": str(artifact), "load_seconds": _since(started)}
    if check or (rebuild and opened.samples):  # new code is always checked
        answer["check"] = _check(opened, executor, quiet or as_json)
    with recorded(executor, trace):
        if source is not None:
            answer["outputs"] = _run(executor, source, output, answer)
            if not (quiet or as_json):
                for name, port in answer["outputs"].items():
                    echo(f"{name}: {port['dtype']}{port['shape']}")
        if options.form:
            answer |= write_texts(
                opened.files, executor, options, prompts, as_json=as_json, quiet=quiet
            )
    answer |= store_answer(executor, quiet or as_json)
    if as_json:
        click.echo(json.dumps(answer, indent=1))
    if any("error" in row for row in answer.get("texts", ())):
        click.get_current_context().exit(Exit.PROMPTS)


def _check_ranks(artifact: Path, rebuild: bool, *, alone: bool) -> None:
    """Raises UsageError for options that are for one process."""
    if rebuild:
        raise UsageError(
            f"{artifact} has the ranks of a plan, and --rebuild is for one "
            "process: compile the plan again on this machine"
        )
    if alone:
        raise UsageError(f"{artifact} has the ranks of a plan: give --input, or a prompt")


def _check_work(
    source: Path | None, output: Path | None, options: TextOptions, *, compares: bool
) -> None:
    """Raises UsageError where there is nothing to do, or two things at once."""
    if source is None and not (options.form or compares):
        raise UsageError("give one of --input FILE, --prompt TEXT or --check")
    if source is not None and options.form:
        raise UsageError(f"--input and {options.form} cannot be combined: leave one out")
    if output is not None and source is None:
        raise UsageError("--output needs --input")


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 4)


def _check(opened: Artifact, executor: Executor, quiet: bool) -> dict[str, Any]:
    """Compare with the artifact's samples. Raises VerificationError, naming the worst output."""
    from moec.runtime.arrays.compare import difference

    if not opened.samples:
        raise SetupError(f"{opened.path} has no samples to check against; use --input")
    tolerance, worst = opened.manifest.tolerance, (0.0, "", 0)
    for index, sample in enumerate(opened.samples):
        executor.reset()
        outputs = executor(sample.inputs)
        for name, expected in sample.outputs.items():
            worst = max(worst, (difference(outputs[name], expected), name, index))
    executor.reset()
    apart, name, index = worst
    if not apart <= tolerance:
        raise VerificationError(
            f"output {name!r} of sample {index} differs by {apart:.2e} (inf: also for NaN), "
            f"and the artifact's tolerance is {tolerance:.2e}"
        )
    count = len(opened.samples)
    if not quiet:
        samples = "sample agrees" if count == 1 else "samples agree"
        click.echo(f"{count} {samples}: greatest difference {apart:.2e}, allowed {tolerance:.2e}")
    return {"samples": count, "difference": apart, "tolerance": tolerance}


def _run(
    executor: Executor, source: Path, output: Path | None, answer: dict[str, Any]
) -> dict[str, Any]:
    from moec.runtime.arrays.tensor_files import read_tensors, write_tensors
    from moec.runtime.checks import check_no_nan

    inputs = read_tensors(source, executor.package.main.inputs)
    check_no_nan("input", inputs)
    started = time.perf_counter()
    outputs = executor(inputs)
    answer["run_seconds"] = _since(started)
    check_no_nan("output", outputs)
    if output is not None:
        write_tensors(output, outputs)
    dtypes = {port.name: port.dtype for port in executor.package.main.outputs}
    return {n: {"dtype": dtypes[n], "shape": list(a.shape)} for n, a in outputs.items()}


def check_trace(path: Path) -> None:
    """Raises UsageError, before anything runs, where no trace could be written to `path`."""
    if path.suffix != ".npz":
        raise UsageError(f"--record-routing {path}: the name must end in .npz")
    check_writable(path, f"--record-routing {path}")


@contextmanager
def recorded(executor: Executor, path: Path | None) -> Iterator[None]:
    """While open, record the choices of routers, and write them to `path`; without a path, nothing.

    Raises InputError where the model was compiled without `--record-routing`. Nothing is written
    where the block raises.
    """
    if path is None:
        yield
        return
    from moec.runtime.call.executor import record_routing
    from moec.runtime.call.routing_trace import save_trace

    with record_routing(executor) as recorder:
        yield
    save_trace(recorder.trace(), path)
