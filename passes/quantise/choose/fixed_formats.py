"""Quantises each product of experts or linear layer to a format of its own."""

from __future__ import annotations

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
    """By the name of the product's result."""
    name: ClassVar[str] = "choose-formats"

    def targets(self, graph: Graph) -> list[tuple[Op, Format]]:
        return [
            (op, self.formats[op.outputs[0].name])
            for op in products(graph)
            if op.outputs[0].name in self.formats
        ]

    def quantised(self, op: Op, format: Format, codes: Codes, b: Builder) -> Sequence[Value]:
        return rule_of(op).quantised(op, format, codes, b)


def products(graph: Graph) -> list[Op]:
    """The products of experts, linear layers and heads whose weights no other op reads."""
    each: tuple[QuantisingPass, ...] = (QuantiseExperts(_ANY), QuantiseLinears(_ANY, _ANY))
    ops = [op for rule in each for op, _ in rule.targets(graph)]
    return [op for op in ops if all(len(graph.readers.get(w, ())) == 1 for w in stored(op))]


def rule_of(op: Op) -> QuantisingPass:
    return QuantiseExperts(_ANY) if op.name == "grouped.linear" else QuantiseLinears(_ANY, _ANY)
