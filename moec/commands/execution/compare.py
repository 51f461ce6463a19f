"""`moec compare A B`: what two artifacts, or a model and an artifact, hold, compute and take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moec.commands.compilation.compiling import compiling
from moec.commands.options.files import OutputFile
from moec.commands.options.options import (
    api_arguments,
    check_only,
    json_option,
    model_options,
    quiet_option,
)
from moec.commands.output.download import local_model
from moec.commands.output.echo import echo
from moec.errors import UsageError
from moec.report.opened import is_artifact, open_artifact
from moec.runtime.package import DECODE, RECORDED

if TYPE_CHECKING:
    from moec.model.compiled import CompiledModel

OF_ARTIFACTS = ("a", "b", "inputs", "prompt", "prompt_tokens", "time", "output", "as_json", "quiet")


@click.command("compare")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "-i", "--input", "inputs", type=click.Path(path_type=Path), metavar="FILE",
    help="Run both on these inputs (.npz, .safetensors, .npy), instead of random ones.",
)  # fmt: skip
@click.option("--prompt", metavar="TEXT", help="Run both on this text, with the tokens of A.")
@click.option(
    "--prompt-tokens", type=click.IntRange(min=1),
    help="Of a random text; default: 256, or the model's limit.",
)  # fmt: skip
@click.option("--time", is_flag=True, help="Time both in turn: prefill and decode, or calls.")
@click.option(
    "-o", "--output", type=OutputFile(".html"), metavar="FILE.html",
    help="Write a page too, with the graphs of both side by side.",
)  # fmt: skip
@json_option
@quiet_option
@model_options
def command(
    a: str,
    b: str,
    inputs: Path | None,
    prompt: str | None,
    prompt_tokens: int | None,
    time: bool,
    output: Path | None,
    as_json: bool,
    quiet: bool,
    revision: str | None,
    **options: Any,
) -> None:
    """Compare A and B: weights, graphs, kernels, outputs and routing.

    Both are artifacts, or one of them is a model, as `moec compile` takes it. It is compiled as it
    is, with the functions of the artifact, and verified against eager PyTorch. Both run on the same
    inputs, and B is described against A. Routing is compared where artifacts were compiled with
    --record-routing.
    """
    sides: list[Any] = [a, b]
    models = [side for side in (0, 1) if not is_artifact(Path(sides[side]))]
    if len(models) == 2:
        raise UsageError(f"neither {a} nor {b} is an artifact: compile one of them first")
    if models:
        model = local_model(sides[models[0]], revision, quiet or as_json)
        arguments = api_arguments(**options)
        artifact = Path(sides[1 - models[0]])
        sides[models[0]] = _compile(model, artifact, arguments, quiet or as_json)
    else:
        check_only(OF_ARTIFACTS, "is of models, and both are artifacts: leave it out")
    from moec.inspect.comparison.compare import compare

    options = {"prompt": prompt, "prompt_tokens": prompt_tokens, "time": time}
    comparison = compare(sides[0], sides[1], inputs, **options)
    if output:
        output.write_text(comparison.page(), encoding="utf-8")
    if not quiet or as_json:
        click.echo(json.dumps(comparison.to_dict(), indent=1) if as_json else str(comparison))
    if output and not (quiet or as_json):
        echo(f"wrote {output}")


def _compile(
    model: str, artifact: Path, arguments: Mapping[str, Any], quiet: bool
) -> CompiledModel:
    """The model with the functions of the artifact, for the CPU."""
    from moec.commands.output.progress import COMPILE

    functions = open_artifact(artifact).manifest.package.functions
    with compiling(quiet, COMPILE) as (compile_model, _):
        return compile_model(
            model,
            **arguments,
            kv_cache=DECODE in functions,
            record_routing=RECORDED in functions,
        )
