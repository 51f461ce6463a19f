"""The choices of `moec optimize` for one model, and the file that has them.

The file is YAML. It has no names of Python, so reading it runs no code, and a field that is not
described here is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from moec.errors import SetupError, UsageError
from moec.files.os_errors import reason
from moec.files.regular_file import read_regular
from moec.ir.formats.notation import Format, parse
from moec.passes.core.damage import ChoiceLine
from moec.passes.quantise.mixed_experts import AnyFormat, ExpertFormats
from moec.runtime.checks import show_bytes

UNCHANGED = "unchanged"
"""The format of a product whose weights stay as they are."""

Count = Annotated[int, msgspec.Meta(ge=0)]


class ProductChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The format of a product's weights: each of its matrices, or those of each expert, have `rows`
    x `columns` weights. `experts` are the numbers of those in other formats. `damage` is the
    predicted one."""

    rows: Count
    columns: Count
    format: str
    bytes: Count
    bytes_before: Count
    damage: float
    experts: dict[str, tuple[Count, ...]] = {}


class LayerChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The `experts` that are left `of` a layer's, and how many a token takes; the bytes that this
    saves with weights as they are, the damage alone, and the part that the dropped experts had of
    all contributions to the layer's results, on the data. With `merged`, each of these groups is
    one expert, in place of its first, and `usage` are the choices of each expert on the data. A
    token skips experts with weights under `threshold` times its greatest. With `constant` the
    others give constants, of the same data, and are chosen as before. With either a token reads
    `mean_k` experts on the data. A layer's shared expert is one of one that every token takes:
    without it `experts` is empty."""

    experts: tuple[Count, ...]
    of: Count
    top_k: Count
    top_k_before: Count
    bytes_saved: int = 0
    damage: float = 0.0
    share: float = 0.0
    merged: tuple[tuple[Count, ...], ...] = ()
    usage: tuple[Count, ...] = ()
    threshold: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    constant: bool = False
    mean_k: float = 0.0

    @property
    def left(self) -> str:
        """In words, how many experts are left, and for each token."""
        if not self.experts:
            return f"no shared expert{', the mean of its results instead' * self.constant}"
        experts = f"{len(self.experts)} {'merged from' if self.merged else 'of'} {self.of} experts"
        experts += ", constants for the others" * self.constant
        under = f" without weights under {self.threshold:.3g} of the greatest"
        light = under if self.threshold else ""
        mean = f", {self.mean_k:.3g} on average{light}" if light or self.constant else ""
        return f"{experts}, {self.top_k} of {self.top_k_before} for each token{mean}"

    @property
    def experts_read(self) -> float:
        """How many experts a token reads, on average."""
        return self.mean_k if self.threshold or self.constant else self.top_k

    @property
    def changes(self) -> bool:
        return bool(len(self.experts) < self.of or self.top_k < self.top_k_before or self.threshold)


class ModelChoices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All choices for a model within `limits`, in words: the bytes of all its weights then, those
    that a token reads, and the `metric` of its damage, as measured and as predicted. `codes` are
    rounded to nearest, or chosen by GPTQ on the calibration data; `products` and the `layers` that
    change are by name; `declined` are reasons why something could not be chosen. Routers are then
    trained on the calibration data for `recover` steps, which the damage does not count."""

    limits: str
    bytes: Count
    token_bytes: Count
    metric: Literal["kl", "squared error"]
    damage: float
    predicted: float
    codes: Literal["nearest", "gptq"]
    products: dict[str, ProductChoice]
    layers: dict[str, LayerChoice]
    declined: tuple[str, ...] = ()
    recover: Count = 0
    version: Literal[1] = 1


def formats_of(products: Mapping[str, ProductChoice]) -> dict[str, AnyFormat]:
    """The formats of the products that are quantised, by name. Raises UsageError."""
    chosen = {name: _formats(name, choice) for name, choice in products.items()}
    return {name: format for name, format in chosen.items() if format is not None}


def _formats(name: str, choice: ProductChoice) -> AnyFormat | None:
    if not choice.experts:
        return None if choice.format == UNCHANGED else parse_format(choice.format)
    texts = (choice.format, *choice.experts)
    if unfit := [text for text in texts if text == UNCHANGED or text.startswith("fp8")]:
        raise SetupError(
            f"{name}: {unfit[0]} is for all experts of a product: give single ones formats of "
            "integers or mxfp4"
        )
    numbers = [e for experts in choice.experts.values() for e in experts]
    if len(set(numbers)) < len(numbers):
        raise SetupError(f"{name}: an expert has two formats: give each number once")
    others = [(parse_format(text), tuple(sorted(e))) for text, e in choice.experts.items()]
    return ExpertFormats(parse_format(choice.format), tuple(others))


def parse_format(text: str) -> Format:
    """The format, with the rows of fp8 weights not rounded, as in kernels of CPUs."""
    format = parse(text)
    return replace(format, row_bits=0) if format.kind == "fp8" else format


def read_choices(path: Path) -> ModelChoices:
    """Raises UsageError for a file that cannot be read, or that has other fields or values."""
    try:
        choices = msgspec.yaml.decode(read_regular(path), type=ModelChoices)
        if not formats_of(choices.products) and not choices.layers:
            raise SetupError("nothing changes: compile without them")
    except OSError as error:
        raise SetupError(f"choices {path} cannot be read: {reason(error)}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, UsageError) as error:
        raise SetupError(f"choices {path}: {' '.join(str(error).split())}") from None
    return choices


def significant(number: float) -> float:
    """With four digits, as files have numbers that were measured."""
    return float(f"{number:.4g}")


def write_choices(choices: ModelChoices, path: Path) -> None:
    """The same choices are the same bytes."""
    import yaml

    text = yaml.safe_dump(
        msgspec.to_builtins(choices), sort_keys=False, default_flow_style=None, width=140
    )
    path.write_text(text, encoding="utf-8")


def describe_choices(choices: ModelChoices) -> list[str]:
    """Sentences for the report: what was chosen, and why, and how well damage was predicted."""
    counts = Counter(_described(choice) for choice in choices.products.values())
    kinds = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    layers = [
        f"{name}: {choice.left}; damage {choice.damage:.3g} alone"
        + (f", other experts contributed {choice.share:.1%}" if choice.experts else "")
        for name, choice in choices.layers.items()
    ]
    return [
        *layers,
        f"chose {kinds}: {show_bytes(choices.bytes)} of weights, {show_bytes(choices.token_bytes)} "
        f"of them for a token ({choices.limits})",
        f"{choices.metric} {choices.damage:.3g} measured, {choices.predicted:.3g} predicted as a "
        f"sum over choices; codes: {choices.codes}",
        *([f"routers are trained for {choices.recover} steps"] if choices.recover else []),
        *(f"could not be chosen: {reason}" for reason in choices.declined),
    ]


def choice_lines(choices: ModelChoices) -> list[ChoiceLine]:
    """A row for each product, and each layer of which experts or top-k change."""
    layers = choices.layers.items()
    return [
        ChoiceLine(name, _described(c), c.bytes_before - c.bytes, c.damage)
        for name, c in choices.products.items()
    ] + [
        ChoiceLine(name, c.left, c.bytes_saved, c.damage, c.share if c.experts else None)
        for name, c in layers
    ]


def _described(choice: ProductChoice) -> str:
    others = [f"{len(experts)} experts {text}" for text, experts in choice.experts.items()]
    return choice.format + (f" ({', '.join(others)})" if others else "")
