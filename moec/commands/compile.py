"""`moec compile MODEL -o out.moec`."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec.cache import ARTIFACTS, Store, default_store, load, save, starts_with
from moec.commands.compilation.checkpoint_key import CheckpointKey
from moec.commands.compilation.compiling import compiling
from moec.commands.compilation.request import CompileRequest, cache_key, check, request_of
from moec.commands.options.options import (
    api_arguments,
    api_options,
    force_option,
    json_option,
    quiet_option,
    report_option,
)
from moec.commands.output.download import local_model
from moec.commands.output.echo import echo
from moec.commands.output.logs import log_options
from moec.commands.output.report import print_json, print_report
from moec.errors import UnsupportedError
from moec.files.hub_files import short_name
from moec.files.whole_folder import check_room
from moec.options import CAPTURES, CHANGES, COMPILES, compile_options
from moec.runtime.artifact.container import open_container, replaceable, replacing
from moec.runtime.process.threads import shorten_spinning

if TYPE_CHECKING:
    from moec.model.compiled import CompiledModel
    from moec.passes.core.runner import PassResult
    from moec.report.report import Report

LOGGER = logging.getLogger(__name__)


@click.command("compile")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The artifact to write (required unless --dry-run or --stop-after).",
)
@api_options(CAPTURES, CHANGES, COMPILES)
@click.option(
    "--dump-ir", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Write the graph after every pass: 00-capture.moe, 01-…",
)  # fmt: skip
@click.option(
    "--emit", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Write the GPU code to this folder too: CUDA C, library and .cubin per architecture; PTX.",
)  # fmt: skip
@click.option(
    "--keep-passes", is_flag=True,
    help="Include the graph after each pass for `moec explore`, with the lines of your code.",
)  # fmt: skip
@click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path), metavar="FILE",
    help="Compile each rank of a plan of `moec plan`, into a folder for `moec run --nproc`.",
)  # fmt: skip
@click.option(
    "--dry-run",
    is_flag=True,
    help="Run all passes, report what was recognised, and estimate cost; generate no code.",
)
@report_option
@json_option
@quiet_option
@force_option
@log_options
def command(**values: Any) -> None:
    """Compile MODEL into an artifact that runs without PyTorch.

    MODEL is a folder with a Hugging Face checkpoint, ORG/NAME or ORG/NAME:FILE.gguf for one of the
    hub, which is downloaded, a .gguf file, a .pt2 file of torch.export, an .onnx file, or
    FILE.py:FACTORY, a function that returns (module, arguments) or (module, arguments,
    dynamic_shapes).

    The result is compared with eager PyTorch on random inputs. If they differ, nothing is written
    and the exit code is 4.

    --quant changes the model: it rounds the weights of experts to int8, int6, int5, int4, int3 or
    int2, with one scale per row or, as in int4:64, per block of 64 weights. :asymmetric adds a zero
    point to each scale. Other formats are fp8 and mxfp4. The rows that such weights multiply are
    rounded to 8 bits; with :rows16 (as in int8:rows16) to 16 bits, which is as exact as floats and
    slower for many rows. On CPUs those of fp8 are not rounded. int8,linears=int8,head=int8 also
    quantises other linear layers, except routers, and the head. The report shows the errors.
    """
    request = request_of(values)
    check(request)
    arguments = api_arguments(**request.options)
    model = local_model(request.model, arguments.pop("revision"), request.silent)
    request = replace(request, model=model)
    _check_room(request)
    store = default_store()
    key = cache_key(request, store)
    if key is not None and _write_cached(request, store, key):
        return
    if request.plan_file is not None:
        _compile_ranks(request, request.plan_file, arguments)
        return
    with nullcontext() if key is None else key.hashing():
        compiled = _compile(request, arguments)
        from moec.pipeline import without_effect

        warnings = without_effect(compiled.pass_results)
        if key is not None and not warnings:
            keep(store, key.value(), request.output)
    if request.quiet:
        for line in warnings:
            echo(f"warning: {line}", err=True)
    if request.options["stop_after"] and not request.dump_ir and not request.as_json:
        from moec.ir.text import print_graph

        click.echo(print_graph(compiled.pass_results[-1].program.graph), nl=False)
        return
    report = _planned(compiled, request) if request.dry_run else compiled.report()
    _tell(request, report, f"wrote {request.output}" if request.builds else "")


def _write_cached(request: CompileRequest, store: Store, key: CheckpointKey) -> bool:
    """Whether the artifact was in the cache, and is written."""
    output = request.output
    # an artifact of such a model and options is stored, of these or other weights
    value = key.value() if starts_with(store, ARTIFACTS, key.start) else None
    if value is None or output is None:
        return False
    if not fetch(store, value, short_name(Path(request.model)), output, overwrite=request.force):
        return False
    from moec.report.opened import open_artifact

    _tell(request, open_artifact(output).report(), f"wrote {output} (from the cache)")
    return True


def _check_room(request: CompileRequest) -> None:
    """Raises SetupError where the disk lacks room for an artifact with half of the weights, some
    of which may be in the checkpoint twice."""
    from moec.commands.compilation.estimate import least_bytes

    if request.builds and request.output is not None:
        check_room(request.output, least_bytes(request.model, request.options) // 2)


def _compile_ranks(request: CompileRequest, plan: Path, arguments: Mapping[str, Any]) -> None:
    """Write the graphs and weights of the ranks of a plan, and print what does not run as planned.
    Raises as `moec.compile_ranks`."""
    from moec.commands.options.shapes import explain_sizes
    from moec.commands.output.progress import hush

    assert request.output is not None, "the request was checked"
    shorten_spinning()
    hush()
    with explain_sizes():
        from moec import compile_ranks

        ranks = {"target", "verify"} | {n for n, each in compile_options().items() if each.ranks}
        options = {n: v for n, v in arguments.items() if n in ranks and v is not None}
        compiled = compile_ranks(
            request.model, plan, request.output, overwrite=request.force, **options
        )
    for declined in compiled.declined:
        echo(f"{declined.where}: not run as planned: {declined.reason}", err=True)
    if not request.quiet:
        echo(f"wrote {request.output}")


def _compile(request: CompileRequest, arguments: Mapping[str, Any]) -> CompiledModel:
    """The compiled model, saved if it was built; its progress is shown."""
    numbers = count()

    def watch(pass_result: PassResult) -> None:
        progress.phase(f"passes {pass_result.name}")
        if request.dump_ir is not None:
            dump(request.dump_ir, next(numbers), pass_result)

    with compiling(request.silent, _phases(request)) as (compile_model, progress):
        compiled = compile_model(
            request.model,
            **{**arguments, "verify": request.verified},
            build=request.builds,
            watch=watch,
        )
        if request.builds and request.output is not None:
            progress.phase("save")
            compiled.save(request.output, overwrite=request.force, keep_passes=request.keep_passes)
        if request.emit is not None:
            _write_code(compiled, request.emit)
    _note_times(request, compiled, progress.times())
    return compiled


def _note_times(
    request: CompileRequest, compiled: CompiledModel, seconds: Mapping[str, float]
) -> None:
    """Logs the slowest steps, and remembers the phases of a whole compilation."""
    from moec.commands.compilation.estimate import PastRun, bytes_of_files, remember

    slowest = sorted(seconds.items(), key=lambda item: -item[1])[:3]
    passes = sorted(compiled.pass_results, key=lambda result: -result.seconds)[:3]
    steps = [*slowest, *((f"pass {result.name}", result.seconds) for result in passes)]
    LOGGER.info("the slowest: %s", ", ".join(f"{name} {time:.2f} s" for name, time in steps))
    if request.builds and (weights := bytes_of_files(request.model)):
        remember(default_store(), PastRun(weights, seconds))


def _phases(request: CompileRequest) -> dict[str, float]:
    """The seconds that each phase is expected to take, by name."""
    from moec.commands.compilation.estimate import bytes_of_files, expected, past_runs
    from moec.commands.output.progress import BEFORE_CODE, COMPILE

    names = {*(COMPILE if request.builds else BEFORE_CODE)}
    names -= {"verify"} if request.verified is False else set()
    otherwise = {name: seconds for name, seconds in COMPILE.items() if name in names}
    weights = bytes_of_files(request.model)
    return expected(past_runs(default_store()), weights, otherwise) if weights else otherwise


def _planned(compiled: CompiledModel, request: CompileRequest) -> Report:
    """The report of a model for which no code was generated, with the estimated cost of one that
    can be compiled."""
    from moec.commands.compilation import estimate

    report, program = compiled.report(), compiled.pass_results[-1].program
    size = sum(program.weights[param.name].nbytes for param in program.graph.params)
    says = "no code was generated; the packed size is an estimate, without padding and copies"
    notes = (*report.notes, says)
    with suppress(UnsupportedError):
        notes += (estimate.of_model(compiled, request.options["opt_level"], size),)
    return replace(report, bytes_out=size, notes=notes)


def _write_code(compiled: CompiledModel, folder: Path) -> None:
    package = compiled.for_gpu or compiled.package
    assert package is not None
    assert package.gpu is not None
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in package.gpu.parts.items():
        (folder / name).write_bytes(content)


def _tell(request: CompileRequest, report: Report, last: str) -> None:
    """Prints the report, and after a report for people the line `last`."""
    if request.as_json:
        print_json(report, request.output)
    elif not request.quiet:
        print_report(report, request.full or not request.builds, last)


def dump(folder: Path, number: int, pass_result: PassResult) -> None:
    """Writes the graph after a pass as text into a folder, numbered in order."""
    from moec.ir.text import print_graph

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:02d}-{pass_result.name}.moe"
    path.write_text(print_graph(pass_result.program.graph))


# Caches artifacts, by checkpoint and options of their compilation (see checkpoint_key.py).
#
# Factories (file.py:factory) are compiled each time, because their code may depend on anything.
# So is a model whose artifact is larger than a fraction of the cache; its kernels are cached.
CACHE_FRACTION = 8  # an artifact may take up to one part in so many of the cache


def fetch(store: Store, key: str, name: str, output: Path, *, overwrite: bool = False) -> bool:
    """Write the cached artifact of a key to the file `output`, with the `name` of a model of the
    same content; returns whether that was done.

    It is not done where nothing is cached, or where `output` exists and must not be replaced.
    Raises SetupError where `output` cannot be written.
    """
    if output.exists() and (not overwrite or output.is_dir() or not replaceable(output)):
        return False
    content = load(store, ARTIFACTS, key)
    if content is None:
        return False
    from moec.runtime.artifact import manifest as manifests

    with (
        replacing(output, folder=False, overwrite=overwrite) as writer,
        tempfile.TemporaryDirectory(prefix=".moec-", dir=output.parent) as folder,
    ):
        path = Path(folder) / output.name
        path.write_bytes(content)
        parts = dict(open_container(path))
        manifest = manifests.load(parts.pop(manifests.NAME))
        manifest.extra["report"]["model"] = name
        writer.add(parts)
        writer.add({manifests.NAME: manifests.dump(manifest)})
    return True


def keep(store: Store, key: str | None, output: Path | None) -> None:
    """Cache the artifact in `output`, unless it is too large, or was made of a checkpoint that was
    changed since it was read, which has no key."""
    if key is None or output is None or not output.is_file():
        return
    if output.stat().st_size <= store.limit // CACHE_FRACTION:
        save(store, ARTIFACTS, {key: output.read_bytes()})
