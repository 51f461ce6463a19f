"""Quantises each product of experts or linear layer to a format of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from moec.formats.notation import Format
from moec.ir.graph import Graph, Op, Value
from moec.passes.core.rewrite import Builder
from moec.passes.quantise.codes import Codes, QuantisingPass
from moec.passes.quantise.gptq_codes import stored
from moec.passes.quantise.quantise_experts import QuantiseExperts
from moec.passes.quantise.quantise_linears import QuantiseLinears

_ANY = Format("int8")


@dataclass(frozen=True)
class FixedFormats(QuantisingPass):
    """Store weights in the formats that were chosen for them (moec optimize)."""

    formats: Mapping[str, Format] = field(default_factory=dict)
    """By the name of the product, as in `named_products`."""
    name: ClassVar[str] = "choose-formats"

    def targets(self, graph: Graph) -> list[tuple[Op, Format]]:
        named = named_products(graph).items()
        return [(op, self.formats[name]) for name, op in named if name in self.formats]

    def quantised(self, op: Op, format: Format, codes: Codes, b: Builder) -> Sequence[Value]:
        rule = QuantiseExperts(_ANY) if op.name == "grouped.linear" else QuantiseLinears(_ANY, _ANY)
        return rule.quantised(op, format, codes, b)


def named_products(graph: Graph) -> dict[str, Op]:
    """The products of experts, linear layers and heads whose weights no other op reads, by the path
    of their module; from the second product of a module on, with its number: "layers.0.mlp#2"."""
    each: tuple[QuantisingPass, ...] = (QuantiseExperts(_ANY), QuantiseLinears(_ANY, _ANY))
    counts: Counter[str] = Counter()
    named: dict[str, Op] = {}
    for op in (op for rule in each for op, _ in rule.targets(graph)):
        if not all(len(graph.readers.get(weight, ())) == 1 for weight in stored(op)):
            continue
        path = op.origin or "(whole model)"
        counts[path] += 1
        named[path if counts[path] == 1 else f"{path}#{counts[path]}"] = op
    return named
