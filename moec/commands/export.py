"""`moec export MODEL -o out.onnx`, or out.gguf."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec.commands.compilation.compiling import compiling
from moec.commands.options.files import check_output
from moec.commands.options.options import (
    OneOf,
    Tolerance,
    api_arguments,
    changing_options,
    check_only,
    force_option,
    json_option,
    model_options,
    quiet_option,
)
from moec.commands.output.download import local_model
from moec.commands.output.echo import echo
from moec.commands.output.logs import log_options
from moec.errors import SetupError, UsageError
from moec.model_path import kind_of_model
from moec.report.units import size

if TYPE_CHECKING:
    from moec.export.gguf import ExportedGguf
    from moec.export.onnx import Exported


FORMATS = ("onnx", "gguf")
GGUF_TYPES = ("bf16", "q8_0", "q4_0")
OF_GGUF = {
    *("model", "output", "form", "quant", "revision"),
    *("as_json", "quiet", "force", "verbose", "log_file"),
}
"""Options that a GGUF file has; the others are of ONNX files."""


@click.command("export")
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The .onnx or .gguf file to write."
)
@click.option(
    "--format", "form", type=OneOf(FORMATS), help="Default: by the name of the file."
)  # fmt: skip
@click.option(
    "--ep", type=OneOf(["cpu", "cuda", "portable"]), default="cpu", show_default=True,
    help="Execution provider: ONNX Runtime's CPU or CUDA kernels, or standard operators only.",
)  # fmt: skip
@click.option(
    "--moe", type=OneOf(["auto", "op", "rows"]), default="auto", show_default=True,
    help="How MoE blocks are written: op is com.microsoft.MoE (QMoE with --quant); rows sorts "
    "rows and multiplies once per expert; auto is op for cuda, and for cpu with --quant where "
    "possible, else rows.",
)  # fmt: skip
@click.option(
    "--cache/--no-cache", default=None,
    help="Take past keys and values as inputs and return present ones; default: for language "
    "models where possible.",
)  # fmt: skip
@click.option(
    "--opset",
    type=click.IntRange(18, 25),
    help="ONNX opset; default: 23, the first with Attention.",
)
@model_options
@changing_options
@click.option(
    "--verify", type=Tolerance(), default="on", show_default=True,
    help="Greatest relative error allowed against eager PyTorch, or off.",
)  # fmt: skip
@json_option
@quiet_option
@force_option
@log_options
def command(
    model: str,
    output: Path | None,
    form: str | None,
    ep: str,
    moe: str,
    cache: bool | None,
    opset: int | None,
    verify: float | bool,
    as_json: bool,
    quiet: bool,
    force: bool,
    revision: str | None,
    **options: Any,
) -> None:
    """Write the complete MODEL as an ONNX file, with its weights in a second file, or as a GGUF
    file for llama.cpp.

    MODEL is a folder with a Hugging Face checkpoint, ORG/NAME of the hub, a .pt2 file of
    torch.export, an .onnx file, or FILE.py:FACTORY, as for `moec compile`.

    The file is run in ONNX Runtime and compared with eager PyTorch on random inputs. If they
    differ, nothing is written and the exit code is 4.

    --quant and approximate passes (--passes, --calib, --budget) change the model as in `moec
    compile`. With --quant the file is compared with the quantised weights in float32, and the
    report also shows the distance to the unquantised model.

    A GGUF file is written of a checkpoint folder, with its tokenizer; --quant is bf16 (the
    default), q8_0 or q4_0, and the other options are of ONNX files.
    """
    path, form = _output(output, form, force)
    if form == "gguf":
        _export_gguf(model, path)
        return
    arguments = api_arguments(**options)
    model = local_model(model, revision, quiet or as_json)
    with compiling(quiet or as_json) as (compile_model, progress):
        compiled = compile_model(
            model,
            **arguments,
            verify=False,
            build=False,
            watch=lambda pass_result: progress.phase(f"passes {pass_result.name}"),
        )
        exported = compiled.export_onnx(
            path, ep, opset=opset, moe=moe, cache=cache, verify=verify, progress=progress.phase
        )
    if as_json:
        click.echo(json.dumps(exported.to_dict(), indent=1))
    elif not quiet:
        echo(render(exported))


def _export_gguf(model: str, path: Path) -> None:
    """Writes a GGUF file. Raises UsageError for options that it does not have."""
    from moec.commands.output.progress import Progress, hush

    check_only(OF_GGUF, f"is of ONNX files: leave it out for {path}")
    options = click.get_current_context().params
    quant = options["quant"] or GGUF_TYPES[0]
    if quant not in GGUF_TYPES:
        raise UsageError(f"--quant {quant}: a GGUF file has {', '.join(GGUF_TYPES)}")
    quiet = options["quiet"] or options["as_json"]
    model = local_model(model, options["revision"], quiet)
    if kind_of_model(model) != "checkpoint":
        raise SetupError(f"{model} is no folder with a checkpoint, which a GGUF file is written of")
    hush()
    from moec.export.gguf import export_gguf

    with Progress(quiet=quiet) as progress:
        exported = export_gguf(Path(model), path, quant, progress.phase)
    if options["as_json"]:
        click.echo(json.dumps(asdict(exported), indent=1))
    elif not options["quiet"]:
        echo(render_gguf(exported))


def render_gguf(exported: ExportedGguf) -> str:
    types = ", ".join(f"{count} {name}" for name, count in exported.types.items())
    text = f"{exported.tokens} tokens" if exported.tokens else "none: the model takes token ids"
    lines = [("for", f"llama.cpp, {exported.architecture}"), ("tensors", types), ("text", text)]
    written = f"wrote {exported.path} ({size(exported.bytes)})"
    return "\n".join([*(f"{name:<10}  {words}" for name, words in lines), written])


def render(exported: Exported) -> str:
    """A summary of what was written, in a few lines."""
    forms = list(exported.forms.values())
    blocks = len(forms)
    rows = [("for", f"{exported.ep}, opset {exported.opset}")]
    each = f", {exported.moe_nodes / blocks:.0f} for an MoE block" if blocks else ""
    rows.append(("nodes", f"{exported.nodes}{each}"))
    for form, words in (
        ("rows", "as sorted rows, one product per expert and projection"),
        ("op", f"as com.microsoft.{'QMoE' if exported.quant else 'MoE'}"),
    ):
        if form in forms:
            rows.append(("MoE blocks", f"{forms.count(form)} {words}"))
    if exported.caches:
        rows.append(("cache", f"keys and values of {exported.caches} layers: past in, present out"))
    for name, error in exported.errors.items():
        against = f" of {exported.quant} in float32" if exported.quant else ""
        rows.append(("error", f"{name} {error:.1e}{against}, allowed {exported.tolerance:.0e}"))
    for line in exported.moved:
        rows.append(("moved", f"{line.output} {line.error:.1%} of its norm by {exported.quant}"))
    if exported.parity:
        share = min(exported.parity.values())
        whose = "the quantised graph's" if exported.quant else "eager's"
        rows.append(("routing", f"{share:.2%} of the tokens chose {whose} experts in each block"))
    rows += [("note", note) for note in exported.notes]
    lines = [f"{name:<10}  {text}" for name, text in rows]
    return "\n".join(
        [*lines, f"wrote {exported.path} ({exported.bytes / 1e6:.1f} MB with its weights)"]
    )


def _output(output: Path | None, form: str | None, force: bool) -> tuple[Path, str]:
    """The output path and its format. Raises UsageError, before minutes of work, if it could not
    be written."""
    if output is None:
        raise UsageError("name the file with -o OUT.onnx or -o OUT.gguf")
    form = form or output.suffix.removeprefix(".")
    if form not in FORMATS or (form == "onnx" and output.suffix != ".onnx"):
        raise UsageError(f"{output}: give the file a name that ends in .onnx or .gguf")
    check_output(output, str(output), force=force)
    return output, form
