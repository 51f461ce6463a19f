"""The choices of `moec optimize` for one model, and the file that has them.

The file is YAML. It has no names of Python, so reading it runs no code, and a field that is not
described here is an error.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from moec.errors import UsageError
from moec.files.os_errors import reason
from moec.formats.notation import Format, parse

UNCHANGED = "unchanged"
"""The format of a product whose weights stay as they are."""

Count = Annotated[int, msgspec.Meta(ge=0)]


class ChoiceRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A record of the file; unknown fields are an error."""


class ProductChoice(ChoiceRecord, frozen=True):
    """The format of a product's weights: each of its matrices, or those of each expert, have `rows`
    x `columns` weights. `damage` is the predicted one."""

    product: str
    rows: Count
    columns: Count
    format: str
    bytes: Count
    bytes_before: Count
    damage: float


class ModelChoices(ChoiceRecord, frozen=True):
    """All choices for a model within `limits`, in words: the bytes of all its weights then, and the
    `metric` of its damage, as measured and as predicted. `codes` are rounded to nearest, or chosen
    by GPTQ on the calibration data."""

    limits: str
    bytes: Count
    metric: Literal["kl", "squared error"]
    damage: float
    predicted: float
    codes: Literal["nearest", "gptq"]
    products: tuple[ProductChoice, ...]
    version: Literal[1] = 1

    @property
    def formats(self) -> dict[str, Format]:
        """The formats of the products that are quantised, by name. Raises UsageError."""
        return {
            choice.product: _format(choice)
            for choice in self.products
            if choice.format != UNCHANGED
        }


def _format(choice: ProductChoice) -> Format:
    try:
        return parse_format(choice.format)
    except UsageError:
        raise UsageError(
            f"{choice.product} has the format {choice.format!r}: write {UNCHANGED}, or a "
            "format as for --quant, such as int4:32"
        ) from None


def parse_format(text: str) -> Format:
    """The format, with the rows of fp8 weights not rounded, as in kernels of CPUs."""
    format = parse(text)
    return replace(format, row_bits=0) if format.kind == "fp8" else format


def read_choices(path: Path) -> ModelChoices:
    """Raises UsageError for a file that cannot be read, or that has other fields or values."""
    try:
        choices = msgspec.yaml.decode(path.read_bytes(), type=ModelChoices)
    except OSError as error:
        raise UsageError(f"choices {path} cannot be read: {reason(error)}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"choices {path}: {' '.join(str(error).split())}") from None
    counts = Counter(choice.product for choice in choices.products)
    if twice := next((name for name, count in counts.items() if count > 1), None):
        raise UsageError(f"choices {path}: {twice} has two formats: leave one")
    try:
        choices.formats  # noqa: B018  a wrong format is reported before any work
    except UsageError as error:
        raise UsageError(f"choices {path}: {error}") from None
    return choices


def write_choices(choices: ModelChoices, path: Path) -> None:
    """The same choices are the same bytes."""
    import yaml

    text = yaml.safe_dump(
        msgspec.to_builtins(choices), sort_keys=False, default_flow_style=None, width=140
    )
    path.write_text(text, encoding="utf-8")


def significant(number: float) -> float:
    """With four digits, as files have numbers that were measured."""
    return float(f"{number:.4g}")
