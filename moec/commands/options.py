"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from moec.dtypes import LONG_NAMES, MODEL_DTYPES, VECTOR_DTYPES
from moec.errors import UsageError
from moec.spelling import did_you_mean, did_you_mean_file

F = TypeVar("F", bound=Callable[..., Any])

_SHORT = {name: LONG_NAMES[name] for name in VECTOR_DTYPES} | {"fp32": "float32", "fp16": "float16"}


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
quiet_option = click.option(
    "-q", "--quiet", is_flag=True, help="Say nothing unless something is wrong."
)
signed_by_option = click.option(
    "--signed-by", type=click.Path(path_type=Path), metavar="FILE",
    help="Refuse an artifact that the owner of this public key has not signed.",
)  # fmt: skip
force_option = click.option("--force", is_flag=True, help="Replace the output where it exists.")


class Tolerance(click.ParamType[Any]):
    """A positive number, `on` or `off`."""

    name = "TOL|off"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | bool:
        if value in ("on", "off"):
            return bool(value == "on")
        if isinstance(value, bool | float):
            return value
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 < number < float("inf"):
            self.fail(f"{value!r} is not a tolerance: give a number such as 1e-4, or off")
        return number


class DTypeName(click.ParamType[Any]):
    """A float dtype by torch's name or a short one."""

    name = "dtype"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name = _SHORT.get(value, value)
        if name not in MODEL_DTYPES:
            near = did_you_mean(str(value), (*MODEL_DTYPES, *_SHORT))
            self.fail(f"{value!r} is not one of {', '.join(MODEL_DTYPES)}{near}")
        return str(name)


class OneOf(click.Choice[str]):
    """A choice, like click's, with a suggestion for a misspelt value."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            near = did_you_mean(str(value), self.choices)
            self.fail(f"{value!r} is not one of {', '.join(self.choices)}{near}")
        return str(value)

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        return f"It is one of {', '.join(self.choices)}."


def model_options(command: F) -> F:
    """Adds the options of every command that captures a model."""
    for decorator in (
        click.option(
            "--passes", default="", metavar="+a,-b", help="Add and leave out passes: +a(option=1)."
        ),
        click.option(
            "-O", "--opt-level", type=click.IntRange(0, 2), default=2, show_default=True,
            help="0: what code needs; 1: fuse MoE blocks; 2: fuse the rest too.",
        ),
        click.option("--dtype", type=DTypeName(), help="Convert the weights first, e.g. bf16."),
        click.option(
            "--describe", metavar="FILE.yaml",
            help="What modules do that cannot be traced: class name, router, experts, top_k, …",
        ),
        click.option(
            "--shapes", multiple=True, metavar="INPUT=SIZES",
            help="What may vary, e.g. input_ids=B[1..8]xS[1..4096]; default: batch and sequence.",
        ),
        click.option(
            "--allow-fixed", multiple=True, metavar="INPUT",
            help="An input of which the model may fix sizes at the example's (images=Bx3x224x224).",
        ),
        click.option(
            "--constant", "constants", multiple=True, metavar="INPUT",
            help="An input that always has the example's values, such as image_grid_thw.",
        ),
    ):  # fmt: skip
        command = decorator(command)
    return command


def changing_options(command: F) -> F:
    """Adds the options of every command that may write a changed model: see `check_changes`."""
    for decorator in (
        click.option("--strict", is_flag=True, help="Exit with 2 where a pass breaks the budget."),
        click.option(
            "--budget", default="", metavar="METRIC<=N,…",
            help="How much damage approximate passes may do; beyond it a layer is left as it is. "
            "METRIC: kl, perplexity, error or changed.",
        ),
        click.option(
            "--calib", metavar="FILE",
            help="Inputs by name (.npz, .safetensors) or a text (.txt: 16 windows of 256 tokens), "
            "on which approximate passes choose and are measured, and --quant chooses codes; "
            "NAME=FILE,NAME=FILE for several domains.",
        ),
        click.option(
            "--quant", metavar="FORMAT",
            help="Store experts in few bits: int8, int4[:32|64|128], fp8, mxfp4; :rows16, "
            ",linears=… and ,head=…: see above.",
        ),
    ):  # fmt: skip
        command = decorator(command)
    return command


def asked(shapes: tuple[str, ...], describe: str | None = None, **options: Any) -> dict[str, Any]:
    """The values of `model_options` and `changing_options` as arguments of `moec.compile`, which
    have the same names.

    Raises UsageError for values that cannot be read, before torch is imported.
    """
    from moec.commands.shapes import dynamic_shapes, parse

    check_changes(**{name: options[name] for name in CHANGES if name in options})
    parsed = parse(shapes)
    if describe is not None:
        if not Path(describe).is_file():
            near = did_you_mean_file(Path(describe))
            raise UsageError(f"--describe {describe}: there is no such file{near}")
        from moec.capture.behaviour.describe import read_descriptions

        options["descriptions"] = read_descriptions(Path(describe))
    return {"dynamic_shapes": dynamic_shapes(parsed), **options}


CHANGES = ("passes", "quant", "calib", "budget")


def check_changes(
    passes: str = "", quant: str | None = None, calib: str | None = None, budget: str = ""
) -> None:
    """Raises UsageError for invalid values of options that change the model. `moec.compile` would
    raise it too, but seconds later, after importing torch."""
    from moec.formats.notation import parse_parts
    from moec.passes.calibration import files
    from moec.passes.calibration.budget import parse_budget
    from moec.passes.core.names import sign_and_name, split

    for item in split(passes):
        sign_and_name(item)
    if quant is not None:
        parse_parts(quant)
    if calib is not None:
        files.check(calib)
    parse_budget(budget)
