"""`moec convert MODEL --quant FORMAT -o FOLDER`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from moec import model_path
from moec.commands.options.options import force_option, json_option, quiet_option, revision_option
from moec.commands.output.download import local_model
from moec.commands.output.echo import echo
from moec.commands.output.logs import log_options
from moec.errors import SetupError, UsageError
from moec.files.checkpoint import CONFIG
from moec.files.whole_folder import check_new_folder
from moec.report.units import counted, size


@click.command("convert")
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FOLDER", help="Where to write it."
)
@click.option(
    "--quant", required=True, metavar="FORMAT",
    help="int4[:32|64|128] or int8[:32|64|128], of experts and linear layers, or by part: "
    "experts=…,linears=….",
)  # fmt: skip
@revision_option
@json_option
@quiet_option
@force_option
@log_options
def command(
    model: str,
    output: Path | None,
    quant: str,
    revision: str | None,
    as_json: bool,
    quiet: bool,
    force: bool,
) -> None:
    """Write MODEL as a checkpoint of transformers whose experts and linear layers are quantised.

    MODEL is a folder with a Hugging Face checkpoint, or ORG/NAME of the hub. Weights are rounded
    as by `moec compile --quant`, and stored as compressed-tensors (pack-quantized), which
    transformers and `moec compile` read. Routers, embeddings and the head stay as they are.
    """
    if output is None:
        raise UsageError("name the folder with -o FOLDER")
    check_new_folder(output, CONFIG, force=force)
    model = local_model(model, revision, quiet or as_json)
    if model_path.kind_of_model(model) != "checkpoint":
        raise SetupError(f"{model} is no folder with a checkpoint, which convert reads")
    if output.exists() and output.samefile(model):
        raise UsageError(f"{output} is the checkpoint itself: write to another folder")

    from moec.commands.output.progress import Progress, hush

    hush()
    from moec.export.checkpoint import convert, parse_conversion

    formats = parse_conversion(quant)
    with Progress(quiet or as_json, plan={"read": 2.0, "write": 7.0}) as progress:
        converted = convert(Path(model), output, formats, progress=progress.phase)
    if as_json:
        click.echo(json.dumps(asdict(converted), indent=1))
    elif not quiet:
        for name, count in converted.formats.items():
            echo(f"{name:<20}  {counted(count, 'weight')}")
        echo(f"{'as they are':<20}  {converted.unchanged}")
        echo(f"wrote {output} ({size(converted.bytes)} in {counted(converted.files, 'file')})")
