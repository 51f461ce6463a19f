"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from moec.dtypes import MODEL_DTYPES, SHORT_NAMES
from moec.errors import UsageError
from moec.files.adapter import read_adapter
from moec.ir.formats.notation import BLOCKS, KINDS, parse_parts
from moec.options import CAPTURES, CHANGES, Option, compile_options
from moec.passes.core.names import NAMES, sign_and_name, split
from moec.spelling import did_you_mean

F = TypeVar("F", bound=Callable[..., Any])


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
            self.fail(f"{value!r} is not a tolerance: give {self.name}, TOL being such as 1e-4")
        return number


class DTypeName(click.ParamType[Any]):
    """A float dtype by torch's name or a short one."""

    name = "dtype"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name = SHORT_NAMES.get(value, value)
        if name not in MODEL_DTYPES:
            near = did_you_mean(str(value), (*MODEL_DTYPES, *SHORT_NAMES))
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


def api_options(*of: str) -> Callable[[F], F]:
    """Adds the options of `moec.compile` that commands of these kinds have, each by its keyword."""

    def add(command: F) -> F:
        for name, option in reversed(compile_options().items()):
            if option.flags and option.of in of:
                command = _click_option(name, option)(command)
        return command

    return add


def _click_option(name: str, option: Option) -> Callable[[F], F]:
    """How the command line reads an option of `moec.compile`."""
    switch, listed = isinstance(option.default, bool) and not option.kind, option.kind == "list"
    return click.option(
        *option.flags.split(), name, type=_KINDS.get(option.kind), metavar=option.metavar,
        default="on" if option.kind == "tolerance" else None if listed else option.default,
        is_flag=(switch and "/" not in option.flags) or None, multiple=listed, help=option.says,
        show_default=bool(option.default) or None,
        shell_complete=partial(_offered, option.kind) if option.kind in _OFFERED else None,
    )  # fmt: skip


_OFFERED = ("target", "format", "pass")


def _offered(kind: str, _: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    """What completion offers for an option that is read as text later, of what is often written."""
    from moec.target import cpu, cuda

    offered = {
        "target": ("cpu", *cpu.TARGETS, *cuda.TARGETS),
        "format": (*KINDS, *(f"{form}:{n}" for form in KINDS[:-1] for n in BLOCKS)),
        "pass": NAMES,
    }
    return [value for value in offered[kind] if value.startswith(incomplete)]


_KINDS: dict[str, click.ParamType[Any]] = {
    "levels": click.IntRange(0, 2),
    "dtype": DTypeName(),
    "tolerance": Tolerance("quick", "full", "layers", "whole"),
    "path": click.Path(path_type=Path),
}
model_options = api_options(CAPTURES)
changing_options = api_options(CHANGES)
revision_option = _click_option("revision", compile_options()["revision"])


def api_arguments(**options: Any) -> dict[str, Any]:
    """The values of `api_options` as keywords of `moec.compile`, which have the same names.

    Raises UsageError for values that cannot be read, before torch is imported.
    """
    from moec.commands.options.shapes import dynamic_shapes, parse

    check_changes(**{name: options[name] for name in CHANGING if name in options})
    for folder in options.get("adapters", ()):
        read_adapter(Path(folder))
    return {**options, "dynamic_shapes": dynamic_shapes(parse(options["dynamic_shapes"]))}


CHANGING = ("passes", "quant", "calib", "budget")


def check_changes(
    passes: str = "", quant: str | None = None, calib: str | None = None, budget: str = ""
) -> None:
    """Raises UsageError for invalid values of options that change the model. `moec.compile` would
    raise it too, but seconds later, after importing torch."""
    from moec.passes.calibration import files
    from moec.passes.calibration.budget import parse_budget

    for item in split(passes):
        sign_and_name(item)
    if quant is not None:
        parse_parts(quant)
    if calib is not None:
        files.check(calib)
    parse_budget(budget)
