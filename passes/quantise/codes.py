"""Stored weights as codes, scales and zeros, for all passes that quantise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch

from moec.dtypes import VECTOR_DTYPES
from moec.errors import NoMatch
from moec.ir.formats.integer import MOST_SUMMED, Quantised, quantise
from moec.ir.formats.notation import Format
from moec.ir.graph import Attr, Graph, Op, Program, TensorType, Value
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Kind, Log, Pass
from moec.sources.memory.memory import InMemory

WIDE = VECTOR_DTYPES
Experts: TypeAlias = "tuple[int, ...]"
"""The numbers of some experts of a stack; none means all."""


def stack_of(weight: torch.Tensor, experts: Experts) -> torch.Tensor:
    """The weights [E, N, K] of experts, or of a linear layer as one."""
    if experts:
        return weight[list(experts)]
    return weight if weight.ndim == 3 else weight[None]


def part_name(weight: str, format: Format, experts: Experts) -> str:
    """The name of the codes of some experts of a stack, or of all."""
    return f"{weight}.{str(format).replace(':', '_')}" if experts else weight


def attributes(format: Format) -> dict[str, Attr]:
    """The attributes of an op for the format of its weights."""
    attrs: dict[str, Attr] = {"kind": format.kind}
    attrs |= {"zeros": True} if format.asymmetric else {}
    return attrs | ({"row_bits": format.row_bits} if format.row_bits != 8 else {})


@dataclass(eq=False)
class Codes:
    """The weights of `program` that have been quantised so far, each once.

    `calibrated` holds codes that were chosen on calibration data, by name, format and experts; all
    other weights are rounded to nearest. `tensors` maps the new params to their contents, in
    `memory`.
    """

    program: Program
    memory: InMemory
    calibrated: dict[tuple[str, Format, Experts], Quantised] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    memo: dict[tuple[Value, Format, Experts], tuple[Value, ...]] = field(default_factory=dict)

    def check(self, matrix: Value, format: Format) -> None:
        """Raises NoMatch if `format` cannot hold the weights [.., N, K]."""
        weight, width = self.program.weights.get(matrix.name), matrix.shape[-1]
        if weight is None:
            raise NoMatch(f"the weights {matrix.name} are computed at run time")
        if matrix.dtype not in WIDE:
            raise NoMatch(f"the weights {matrix} are not of {', '.join(WIDE)}")
        if not isinstance(width, int) or (format.block and width % format.block):
            raise NoMatch(f"blocks of {format.block} do not divide the {width} weights of a row")
        if not format.block and width > MOST_SUMMED:
            raise NoMatch(f"a row of {width} weights is too long for one scale: choose a block")
        parts = weight if weight.ndim == 3 else weight[None]
        if not all(bool(torch.stack(part.aminmax()).isfinite().all()) for part in parts):
            raise NoMatch(f"the weights {matrix.name} hold an infinity or a NaN")

    def params(
        self, matrix: Value, format: Format, b: Builder, experts: Experts = ()
    ) -> tuple[Value, ...]:
        """Params of the new graph with the codes, scales and, if asymmetric, zeros: of all experts,
        or of those in `experts`."""
        key = matrix, format, experts
        if key not in self.memo:
            self.memo[key] = self._params(matrix, format, b, experts)
        return self.memo[key]

    def _params(
        self, matrix: Value, format: Format, b: Builder, experts: Experts
    ) -> tuple[Value, ...]:
        quantised = self.calibrated.get((matrix.name, format, experts))
        if quantised is None:
            quantised = quantise(format, stack_of(self.program.weights[matrix.name], experts))
        shape = (len(experts), *matrix.shape[1:]) if experts else matrix.shape
        blocks = (*shape[:-1], quantised.scales.shape[-1])
        parts = [
            ("codes", TensorType("u8", shape), quantised.codes),
            ("scales", TensorType(format.scale_dtype, blocks), quantised.scales),
        ]
        if quantised.zeros is not None:
            parts.append(("zeros", TensorType(format.zero_dtype, blocks), quantised.zeros))
        values = []
        for name, type, tensor in parts:
            values.append(b.param(f"{part_name(matrix.name, format, experts)}.{name}", type))
            sizes = [int(str(d)) for d in type.shape]
            self.tensors[values[-1].name] = self.memory.tensor(tensor.reshape(sizes))
        return tuple(values)

    def program_of(self, graph: Graph) -> Program:
        """The program of `graph` with the weights that it reads, old and new."""
        names = {p.name for p in graph.params} | {s.before.name for s in graph.states}
        weights = {**self.program.weights, **self.tensors}
        return Program(graph, {n: t for n, t in weights.items() if n in names})


class QuantisingPass(Pass, ABC):
    """A pass that replaces weights by codes and scales."""

    kind: ClassVar[Kind] = Kind.QUANTISES

    @abstractmethod
    def targets(self, graph: Graph) -> Sequence[tuple[Op, Any]]:
        """The ops whose weights are to be quantised, each with its format."""

    @abstractmethod
    def quantised(self, op: Op, format: Any, codes: Codes, b: Builder) -> Sequence[Value]:
        """Emits the quantised op. Raises NoMatch if `format` cannot hold its weights."""

    def parts(self, op: Op, format: Any) -> Sequence[tuple[Format, Experts]]:
        """The formats of a target's weights, each with its experts."""
        return ((format, ()),)

    def run(self, program: Program, log: Log) -> Program:
        return self.rounded(program, log, Codes(program, log.memory))

    def rounded(self, program: Program, log: Log, codes: Codes) -> Program:
        """The program with weights replaced by `codes`."""
        formats = {op.outputs[0].name: (op.name, f) for op, f in self.targets(program.graph)}

        def rule(op: Op, b: Builder) -> Sequence[Value] | None:
            name, format = formats.get(op.outputs[0].name, ("", None))
            if format is None or op.name != name:
                return None
            return self.quantised(op, format, codes, b)

        return codes.program_of(rewrite(program.graph, rule, log))
