"""Quantises each product of experts or linear layer to a format of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from moec.errors import NoMatch
from moec.ir.formats.notation import Format
from moec.ir.graph import Graph, Op, Program, Value
from moec.passes.core.rewrite import Builder
from moec.passes.core.runner import Log
from moec.passes.quantise.codes import Codes, QuantisingPass
from moec.passes.quantise.gptq_codes import stored
from moec.passes.quantise.mixed_experts import AnyFormat, Part, mixed, parts_of
from moec.passes.quantise.quantise_experts import QuantiseExperts
from moec.passes.quantise.quantise_linears import QuantiseLinears

_ANY = Format("int8")


@dataclass(frozen=True)
class FixedFormats(QuantisingPass):
    """Store weights in the formats that were chosen for them (moec optimize).

    `formats` are by the name of the product, as in `named_products`. If `shapes` has any, it has
    the rows and columns of all products: for another graph the pass declines, as another form of
    the model may have them. `calibrated`: codes are chosen by GPTQ."""

    formats: Mapping[str, AnyFormat] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    calibrated: bool = False
    name: ClassVar[str] = "choose-formats"
    source: ClassVar[str] = ""

    def targets(self, graph: Graph) -> list[tuple[Op, AnyFormat]]:
        named = {} if self._mismatch(graph) else named_products(graph)
        return [(op, self.formats[name]) for name, op in named.items() if name in self.formats]

    def parts(self, op: Op, format: AnyFormat) -> Sequence[Part]:
        experts = stored(op)[0].shape[0] if op.name == "grouped.linear" else 0
        return parts_of(format, int(str(experts)))

    def quantised(self, op: Op, format: AnyFormat, codes: Codes, b: Builder) -> Sequence[Value]:
        (first, _), *others = parts = self.parts(op, format)
        if others:
            return mixed(op, parts, codes, b)
        rule = QuantiseExperts(_ANY) if op.name == "grouped.linear" else QuantiseLinears(_ANY, _ANY)
        return rule.quantised(op, first, codes, b)

    def rounded(self, program: Program, log: Log, codes: Codes) -> Program:
        if why := self._mismatch(program.graph):
            log.decline("choices", why)
        return super().rounded(program, log, codes)

    def _mismatch(self, graph: Graph) -> str:
        """Why `shapes` are not those of the graph; empty if they are."""
        actual = {name: shape_of(op) for name, op in named_products(graph).items()}
        names = sorted({name for name, _ in self.shapes.items() ^ actual.items()})
        if self.shapes and names:
            return f"the products differ at {names[0]}"
        for name, op in named_products(graph).items() if self.shapes else ():
            try:
                self.parts(op, self.formats.get(name, _ANY))
            except NoMatch as why:
                return f"{name}: {why}"
        return ""


def shape_of(product: Op) -> tuple[int, int]:
    """The rows and columns of each matrix of a product, of one expert."""
    rows, columns = stored(product)[0].shape[-2:]
    return int(str(rows)), int(str(columns))


def named_products(graph: Graph) -> dict[str, Op]:
    """The products of experts, linear layers and heads whose weights no other op reads, by the path
    of their module; from the second product of a module on, with its number: "layers.0.mlp#2"."""
    each: tuple[QuantisingPass, ...] = (QuantiseExperts(_ANY), QuantiseLinears(_ANY, _ANY))
    counts: Counter[str] = Counter()
    named: dict[str, Op] = {}
    for op in (op for rule in each for op, _ in rule.targets(graph)):
        if all(len(graph.readers.get(weight, ())) == 1 for weight in stored(op)):
            path = op.origin or "(whole model)"
            counts[path] += 1
            named[path if counts[path] == 1 else f"{path}#{counts[path]}"] = op
    return named
