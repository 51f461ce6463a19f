"""`moec compile MODEL -o out.moec`."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec import model_path
from moec.cache import default_store
from moec.commands.artifact_cache import fetch, keep, key_for
from moec.commands.echo import echo
from moec.commands.files import check_folder, check_writable
from moec.commands.logs import log_options
from moec.commands.options import (
    Tolerance,
    asked,
    changing_options,
    force_option,
    json_option,
    model_options,
    quiet_option,
)
from moec.errors import UnsupportedError, UsageError
from moec.passes.core.names import check_last
from moec.target.named import parse_both

if TYPE_CHECKING:
    from moec.ir.graph import Program
    from moec.model.compiled import CompiledModel
    from moec.passes.core.runner import PassResult
    from moec.report.report import Report


LOGGER = logging.getLogger(__name__)


@click.command("compile", short_help="Compile a model into an artifact.")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The artifact to write (required unless --dry-run or --stop-after).",
)
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    help="The machine to compile for; see `moec list targets`.",
)
@model_options
@changing_options
@click.option(
    "--verify", type=Tolerance(), default="on", show_default=True,
    help="Greatest relative error allowed against eager PyTorch, or off.",
)  # fmt: skip
@click.option(
    "--dump-ir", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Write the graph after every pass: 00-capture.moe, 01-…",
)  # fmt: skip
@click.option(
    "--emit", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Write the GPU code to this folder too: kernels.cu and one .cubin per architecture.",
)  # fmt: skip
@click.option(
    "--stop-after", metavar="PASS", help="Print the graph after this pass; generate no code."
)
@click.option(
    "--kv-cache/--no-kv-cache", default=True, show_default=True,
    help="For a language model: include the code that generates text with a KV cache.",
)  # fmt: skip
@click.option(
    "--record-routing", is_flag=True,
    help="Include the code for `moec run --record-routing FILE.npz`.",
)  # fmt: skip
@click.option(
    "--tune", is_flag=True,
    help="Measure variants of the kernels on this machine, use the fastest, and remember them.",
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
@json_option
@quiet_option
@force_option
@log_options
def command(
    model: str,
    output: Path | None,
    target: str,
    verify: float | bool,
    dump_ir: Path | None,
    emit: Path | None,
    stop_after: str | None,
    kv_cache: bool,
    record_routing: bool,
    tune: bool,
    plan_file: Path | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    force: bool,
    **options: Any,
) -> None:
    """Compile MODEL into an artifact that runs without PyTorch.

    MODEL is a folder with a Hugging Face checkpoint, a .pt2 file of torch.export, or
    FILE.py:FACTORY, a function that returns (module, arguments) or (module, arguments,
    dynamic_shapes).

    The result is compared with eager PyTorch on random inputs. If they differ, nothing is written
    and the exit code is 2.

    --quant changes the model: it rounds the weights of experts to int8 or int4, with one scale
    per row or, as in int4:64, per block of 64 weights. :asymmetric adds a zero point to each scale.
    Other formats are mxfp4 and, on GPUs, fp8. The rows that such weights multiply are rounded to
    8 bits; with :rows16 (as in int8:rows16) to 16 bits, which is as exact as floats and slower for
    many rows. int8,linears=int8,head=int8 also quantises other linear layers, except routers, and
    the head. The report shows the errors.
    """
    from moec.commands.shapes import explained

    builds = not (dry_run or stop_after)
    _check_output(output, builds, force, ranks=plan_file is not None)
    for option, folder in (("--dump-ir", dump_ir), ("--emit", emit)):
        if folder is not None:
            check_folder(folder, f"{option} {folder}")
    if emit is not None and not (builds and "cuda" in target):
        raise UsageError("--emit writes GPU code: give -o and a GPU, such as --target cuda:sm_80")
    model_path.kind_of_model(model)
    parse_both(target)
    if stop_after is not None:
        check_last(stop_after)
    if plan_file is not None and not plan_file.is_file():
        raise UsageError(f"{plan_file} does not exist")
    arguments = asked(**options)
    key = None
    if (
        output is not None
        and builds
        and not (dump_ir or emit or tune or plan_file or options["calib"] or options["describe"])
    ):
        store = default_store()
        described = {"target": target, "verify": verify, "kv_cache": kv_cache, **options}
        described["record_routing"] = record_routing
        key = key_for(model, described, store)
        if key is not None and fetch(store, key, output, overwrite=force):
            last = f"wrote {output} (from the cache)"
            _tell(_recorded(output), output, as_json, quiet, last)
            return

    from moec.commands import estimate
    from moec.commands.progress import BEFORE_CODE, COMPILE, Progress, hush

    if plan_file is not None:
        from moec.commands.ranks import compile_ranks

        if "cuda" in target:
            raise UsageError(
                f"--target {target}: ranks of a plan run on CPUs and exchange rows over gloo; GPUs "
                "with NCCL are not supported yet"
            )
        if not builds or output is None or target != "cpu" or tune or dump_ir or record_routing:
            raise UsageError(
                "--plan accepts only MODEL, -o and --verify: leave out the other options"
            )
        hush()
        with explained():
            compile_ranks(model, plan_file, output, arguments, verify, force)
        if not quiet:
            echo(f"wrote {output}")
        return
    dump = None if dump_ir is None else Dump(dump_ir)
    plan = {name: COMPILE[name] for name in COMPILE if builds or name in BEFORE_CODE}
    if not builds or verify is False:
        plan.pop("verify", None)

    def watch(pass_result: PassResult) -> None:
        progress.phase(f"passes {pass_result.name}")
        if dump:
            dump(pass_result)

    hush()
    if cost := estimate.of_files(model):
        LOGGER.info(cost)
    silent = quiet or (as_json and not _on_terminal())
    with explained(), Progress(silent, plan=plan) as progress:
        progress.phase("start")  # imports torch, which takes a moment, and checks options
        from moec.api import compile as compile_model

        compiled = compile_model(
            model,
            **arguments,
            target=target,
            verify=verify if builds else False,
            stop_after=stop_after,
            build=builds,
            kv_cache=kv_cache,
            record_routing=record_routing,
            tune=tune,
            watch=watch,
            progress=progress.phase,
        )
        if builds and output is not None:
            progress.phase("save")
            compiled.save(output, overwrite=force)
        if emit is not None:
            _write_code(compiled, emit)
    from moec.pipeline import without_effect

    warnings = without_effect(compiled.pass_results)
    if key is not None and output is not None and not warnings:
        keep(store, key, output)
    if quiet:
        for line in warnings:
            echo(f"warning: {line}", err=True)
    report = compiled.report()
    if dry_run:
        size = weight_bytes(compiled.pass_results[-1].program)
        notes = (*report.notes, _NOT_BUILT, *_estimated(compiled, options["opt_level"], size))
        report = replace(report, bytes_out=size, notes=notes)
    if stop_after and not dump_ir and not as_json:
        from moec.ir.text import print_graph

        click.echo(print_graph(compiled.pass_results[-1].program.graph), nl=False)
        return
    _tell(report, output, as_json, quiet, f"wrote {output}" if builds else "")


def _estimated(compiled: CompiledModel, opt_level: int, weights: int) -> tuple[str, ...]:
    """The estimated cost of a compilation; empty for a model that cannot be compiled."""
    from moec.commands import estimate

    try:
        return (estimate.of_model(compiled, opt_level, weights),)
    except UnsupportedError:
        return ()


def _write_code(compiled: CompiledModel, folder: Path) -> None:
    package = compiled.for_gpu or compiled.package
    assert package is not None
    assert package.gpu is not None
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in package.gpu.parts.items():
        (folder / name).write_bytes(content)


def _tell(report: Report, output: Path | None, as_json: bool, quiet: bool, last: str) -> None:
    if as_json:
        click.echo(json.dumps({**report.to_dict(), "output": output and str(output)}, indent=1))
    elif not quiet:
        from moec.report.text import render, terminal_width

        click.echo(render(report, terminal_width(), color=_stdout_is_terminal()), nl=False)
        if last:
            echo(last)


def _recorded(output: Path) -> Report:
    """The report that was stored when an artifact was compiled."""
    from moec.commands.inspect import of_artifact

    return of_artifact(output)[0]


_NOT_BUILT = "no code was generated; the packed size is an estimate, without padding and copies"


def weight_bytes(program: Program) -> int:
    """The bytes of the weights that a program reads, as stored."""
    read = (program.weights[param.name] for param in program.graph.params)
    return sum(tensor.numel() * tensor.element_size() for tensor in read)


class Dump:
    """Writes the graph after each pass as text into a folder, numbered in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written = 0

    def __call__(self, pass_result: PassResult) -> None:
        from moec.ir.text import print_graph

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.written:02d}-{pass_result.name}.moe"
        path.write_text(print_graph(pass_result.program.graph))
        self.written += 1


def _check_output(output: Path | None, builds: bool, force: bool, *, ranks: bool) -> None:
    """Raises UsageError for an output that could not be written, before minutes of work."""
    if not builds:
        return
    if output is None:
        raise UsageError("name the artifact with -o OUT.moec, or compile nothing with --dry-run")
    from moec.runtime.container import replaceable

    if output.exists() and not force:
        raise UsageError(f"{output} exists; --force replaces it")
    if output.exists() and not ranks and not replaceable(output):
        raise UsageError(
            f"{output} is not an artifact, and --force replaces artifacts only: choose another name"
        )
    if not output.is_dir():
        check_writable(output, str(output))


def _on_terminal() -> bool:
    import sys

    return sys.stderr.isatty()


def _stdout_is_terminal() -> bool:
    import sys

    return sys.stdout.isatty()
