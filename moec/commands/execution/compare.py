"""`moec compare A B`: what two artifacts hold, compute and take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from moec.commands.options.options import json_option


@click.command("compare", short_help="Compare two artifacts.")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
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
@json_option
def command(a: Path, b: Path, as_json: bool, **options: Any) -> None:
    """Compare the artifacts A and B: weights, graphs, kernels, outputs and routing.

    Both run on the same inputs, and B is described against A. Routing is compared where both were
    compiled with --record-routing. A model that is no artifact has to be compiled first.
    """
    from moec.comparison.compare import compare

    comparison = compare(a, b, **options)
    click.echo(json.dumps(comparison.to_dict(), indent=1) if as_json else str(comparison))
