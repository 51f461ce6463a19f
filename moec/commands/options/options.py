"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from moec.dtypes import LONG_NAMES, MODEL_DTYPES, VECTOR_DTYPES
from moec.errors import UsageError
from moec.files.adapter import read_adapter
from moec.spelling import did_you_mean

F = TypeVar("F", bound=Callable[..., Any])

_SHORT = {name: LONG_NAMES[name] for name in VECTOR_DTYPES} | {"fp32": "float32", "fp16": "float16"}


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as one JSON document."
)


def check_only(names: Collection[str], refusal: str) -> None:
    """Raises UsageError, with `refusal` after the option, where the command line has an option
    that is not among `names`."""
    context = click.get_current_context()
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name not in names and source is ParameterSource.COMMANDLINE:
            raise UsageError(f"{option.opts[0]} {refusal}")


report_option = click.option(
    "--report", "full", is_flag=True,
    help="Print the whole report: blocks, passes, kernels, errors of each output and reasons.",
)  # fmt: skip
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print only warnings and errors.")
memory_option = click.option(
    "--memory", metavar="SIZE",
    help="The most memory to take, e.g. 4GiB: experts that do not fit are read from the artifact "
    "when a token chooses them.",
)  # fmt: skip
signed_by_option = click.option(
    "--signed-by", type=click.Path(path_type=Path), metavar="FILE",
    help="Refuse the artifact unless it is signed with the private key of this public key.",
)  # fmt: skip
revision_option = click.option(
    "--revision", metavar="BRANCH|TAG|COMMIT",
    help="Of a model that is named by its id on the Hugging Face hub, ORG/NAME.",
)  # fmt: skip
force_option = click.option("--force", is_flag=True, help="Replace the output if it exists.")


class Tolerance(click.ParamType[Any]):
    """A positive number, `on`, `off`, or one of `ways`."""

    def __init__(self, *ways: str) -> None:
        self.ways, self.name = ways, "|".join(["TOL", "off", *ways])

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | bool | str:
        if value in self.ways:
            return str(value)
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
            "--passes", default="", metavar="+a,-b", help="Add (+) or remove (-) passes, with "
            "options as in +a(option=1); see moec list passes."
        ),
        click.option(
            "-O", "--opt-level", type=click.IntRange(0, 2), default=2, show_default=True,
            help="0: only the passes that code generation needs; 1: fuse MoE blocks too; 2: fuse "
            "all layers. 0 also omits LLVM's optimisation, on CPUs only.",
        ),
        click.option("--dtype", type=DTypeName(), help="Convert the weights first, e.g. bf16."),
        click.option(
            "--shapes", multiple=True, metavar="INPUT=SIZES",
            help="Sizes that may vary, e.g. input_ids=B[1..8]xS[1..4096]; default: batch and "
            "sequence.",
        ),
        click.option(
            "--allow-fixed", multiple=True, metavar="INPUT",
            help="Accept that the model works only at the example's sizes of this input.",
        ),
        click.option(
            "--constant", "constants", multiple=True, metavar="INPUT",
            help="An input that always has the example's values, such as image_grid_thw.",
        ),
        click.option(
            "--adapter", "adapters", multiple=True, metavar="DIR",
            help="Merge this LoRA or DoRA adapter of PEFT into the weights; several in order.",
        ),
        revision_option,
    ):  # fmt: skip
        command = decorator(command)
    return command


def changing_options(command: F) -> F:
    """Adds the options of every command that may write a changed model: see `check_changes`."""
    for decorator in (
        click.option("--strict", is_flag=True, help="Exit with code 2 if a pass exceeds the "
        "budget."),
        click.option(
            "--budget", default="", metavar="METRIC<=N,…",
            help="The greatest loss of quality that approximate passes may cause; a layer that "
            "exceeds it is left unchanged. METRIC: kl, perplexity, error or changed.",
        ),
        click.option(
            "--calib", metavar="FILE",
            help="Calibration data for approximate passes and --quant: inputs by name (.npz, "
            ".safetensors), or a text (.txt, read as 16 windows of 256 tokens); "
            "NAME=FILE,NAME=FILE for several domains.",
        ),
        click.option(
            "--quant", metavar="FORMAT",
            help="Quantise experts: int2 to int6, int8, fp8 (each [:32|64|128]) or mxfp4; "
            "options :rows16, ,linears=… and ,head=… are explained above.",
        ),
    ):  # fmt: skip
        command = decorator(command)
    return command


def api_arguments(shapes: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """The values of `model_options` and `changing_options` as arguments of `moec.compile`, which
    have the same names.

    Raises UsageError for values that cannot be read, before torch is imported.
    """
    from moec.commands.options.shapes import dynamic_shapes, parse

    check_changes(**{name: options[name] for name in CHANGES if name in options})
    for folder in options.get("adapters", ()):
        read_adapter(Path(folder))
    parsed = parse(shapes)
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
