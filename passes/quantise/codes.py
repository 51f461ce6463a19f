"""Stored weights as codes, scales and zeros: what the passes that quantise share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from moec.errors import NoMatch
from moec.formats.integer import MOST_SUMMED, Format, Quantised, quantise
from moec.ir.graph import Attr, Graph, Op, Program, Stage, TensorType, Value
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Kind, Log, Pass

WIDE = ("f32", "bf16", "f16")


def attributes(format: Format) -> dict[str, Attr]:
    """What an op says of the format of its weights."""
    made: dict[str, Attr] = {"kind": format.kind}
    made |= {"zeros": True} if format.asymmetric else {}
    return made | ({"row_bits": format.row_bits} if format.row_bits != 8 else {})


@dataclass(eq=False)
class Codes:
    """The weights of `program` that have been quantised so far: each once, whoever reads it.

    `found` holds codes that were chosen on calibration data, by name and format; all other
    weights are rounded to nearest.
    """

    program: Program
    found: dict[tuple[str, Format], Quantised] = field(default_factory=dict)
    made: dict[str, torch.Tensor] = field(default_factory=dict)
    known: dict[tuple[Value, Format], tuple[Value, ...]] = field(default_factory=dict)

    def check(self, matrix: Value, format: Format) -> None:
        """Raises NoMatch where [.., N, K] are no weights that `format` can hold."""
        weight, width = self.program.weights.get(matrix.name), matrix.shape[-1]
        if weight is None:
            raise NoMatch(f"the weights {matrix.name} are computed while the model runs")
        if matrix.dtype not in WIDE:
            raise NoMatch(f"the weights {matrix} are not of {', '.join(WIDE)}")
        if not isinstance(width, int) or (format.block and width % format.block):
            raise NoMatch(f"blocks of {format.block} do not divide the {width} weights of a row")
        if not format.block and width > MOST_SUMMED:
            raise NoMatch(f"a row of {width} weights is too long for one scale: choose a block")
        parts = weight if weight.ndim == 3 else weight[None]
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise NoMatch(f"the weights {matrix.name} hold an infinity or a NaN")

    def params(self, matrix: Value, format: Format, b: Builder) -> tuple[Value, ...]:
        """Params of the new graph with the codes, scales and, if asymmetric, zeros."""
        if (matrix, format) not in self.known:
            self.known[matrix, format] = self._params(matrix, format, b)
        return self.known[matrix, format]

    def _params(self, matrix: Value, format: Format, b: Builder) -> tuple[Value, ...]:
        found = self.found.get((matrix.name, format))
        if found is None:
            weight = self.program.weights[matrix.name]
            found = quantise(format, weight if weight.ndim == 3 else weight[None])
        blocks = (*matrix.shape[:-1], found.scales.shape[-1])
        parts = [
            ("codes", TensorType("u8", matrix.shape), found.codes),
            ("scales", TensorType(format.scale_dtype, blocks), found.scales),
        ]
        if found.zeros is not None:
            parts.append(("zeros", TensorType("u8", blocks), found.zeros))
        values = []
        for name, type, tensor in parts:
            values.append(b.param(f"{matrix.name}.{name}", type))
            self.made[values[-1].name] = tensor.reshape([int(str(d)) for d in type.shape])
        return tuple(values)

    def program_of(self, graph: Graph) -> Program:
        """`graph` with the weights that it reads, old and new."""
        kept = {p.name for p in graph.params} | {s.before.name for s in graph.states}
        weights = {**self.program.weights, **self.made}
        return Program(graph, {n: t for n, t in weights.items() if n in kept})


class Quantising(Pass, ABC):
    """A pass that puts codes in the place of weights."""

    takes: ClassVar[Stage] = Stage.GROUPED
    gives: ClassVar[Stage] = Stage.GROUPED
    kind: ClassVar[Kind] = Kind.QUANTISES

    @abstractmethod
    def wanted(self, graph: Graph) -> list[tuple[Op, Format]]:
        """The ops whose weights are to be quantised, each with its format."""

    @abstractmethod
    def quantised(self, op: Op, format: Format, codes: Codes, b: Builder) -> Sequence[Value]:
        """What the op becomes. Raises NoMatch where its weights cannot be in `format`."""

    def run(self, program: Program, log: Log) -> Program:
        return self.rounded(program, log, Codes(program))

    def rounded(self, program: Program, log: Log, codes: Codes) -> Program:
        """The program with `codes` in the place of weights."""
        formats = {op.outputs[0].name: (op.name, f) for op, f in self.wanted(program.graph)}

        def rule(op: Op, b: Builder) -> Sequence[Value] | None:
            name, format = formats.get(op.outputs[0].name, ("", None))
            if format is None or op.name != name:
                return None
            return self.quantised(op, format, codes, b)

        return codes.program_of(rewrite(program.graph, rule, log))
