"""Stores each product's weights in the format that a file of choices has for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.errors import UsageError
from moec.formats.notation import Format
from moec.ir.graph import Graph, Op, Program, Value
from moec.passes.approximate.choices.model_choices import ModelChoices
from moec.passes.core.rewrite import Builder
from moec.passes.core.runner import Log
from moec.passes.quantise.codes import Codes, QuantisingPass
from moec.passes.quantise.fixed_formats import FixedFormats, named_products
from moec.passes.quantise.gptq_codes import stored
from moec.runtime.checks import show_bytes


@dataclass(frozen=True)
class ChooseFormats(QuantisingPass):
    """Store weights in the formats that were chosen for them. Raises UsageError where the products
    are not those of the choices."""

    choices: ModelChoices
    name: ClassVar[str] = "choose-formats"
    source: ClassVar[str] = ""

    def targets(self, graph: Graph) -> list[tuple[Op, Format]]:
        check_products(self.choices, graph)
        return FixedFormats(self.choices.formats).targets(graph)

    def quantised(self, op: Op, format: Format, codes: Codes, b: Builder) -> Sequence[Value]:
        return FixedFormats().quantised(op, format, codes, b)

    def rounded(self, program: Program, log: Log, codes: Codes) -> Program:
        log.says += describe_choices(self.choices)
        return super().rounded(program, log, codes)


def check_products(choices: ModelChoices, graph: Graph) -> None:
    """Raises UsageError where the graph has other products, or products of other shapes."""
    shapes = {name: shape_of(op) for name, op in named_products(graph).items()}
    chosen = {choice.product: (choice.rows, choice.columns) for choice in choices.products}
    for name in sorted(chosen.keys() ^ shapes.keys()):
        side = "the model has no such product" if name in chosen else "the choices lack it"
        raise UsageError(f"choices: {name}: {side}: give those that moec optimize wrote for it")
    for name, shape in chosen.items():
        if shape != shapes[name]:
            raise UsageError(
                f"choices: {name} has {shape[0]} x {shape[1]} weights there, and {shapes[name][0]} "
                f"x {shapes[name][1]} in the model: give those that moec optimize wrote for it"
            )


def shape_of(product: Op) -> tuple[int, int]:
    """The rows and columns of each matrix of a product, of one expert."""
    rows, columns = stored(product)[0].shape[-2:]
    return int(str(rows)), int(str(columns))


def describe_choices(choices: ModelChoices) -> list[str]:
    """Sentences for the report: what was chosen, and how well its damage was predicted."""
    counts = Counter(choice.format for choice in choices.products)
    kinds = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return [
        f"chose {kinds}: {show_bytes(choices.bytes)} of weights ({choices.limits})",
        f"{choices.metric} {choices.damage:.3g} measured, {choices.predicted:.3g} predicted "
        f"as a sum over choices; codes: {choices.codes}",
    ]
