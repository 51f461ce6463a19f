"""Weights stay in the codes of their checkpoint.

    h = grouped.linear(x, ends, gate, up, order)   ->   h = grouped.quantised(x, ends, gate.codes,
                                                            gate.scales, up.codes, …, order)

A weight of the graph is a view of a weight of the model, so its codes and scales are views of those
that the checkpoint has. A weight that the checkpoint stores in a form without kernels is rounded to
the nearest format that has. Routers are not quantised: they compute with the dequantised weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from moec.ir.formats.integer import TINY, Quantised, dequantise, some_rows
from moec.ir.formats.notation import Format
from moec.ir.graph import Graph, Op, Program, Value
from moec.ir.ops.experts.grouped import GroupedLinear
from moec.passes.core.rewrite import Builder
from moec.passes.core.runner import Log
from moec.passes.quantise.codes import Codes, QuantisingPass
from moec.passes.quantise.quantise_experts import QuantiseExperts
from moec.passes.quantise.quantise_linears import LINEAR, QuantiseLinears, routers
from moec.sources.checkpoint.arrange import ArrangedCodes
from moec.sources.checkpoint.weight import nearest_int8
from moec.sources.memory.memory import InMemory

ROUNDING = 2.0**-7
"""Twice the relative error of a weight that was rounded to bfloat16 when it was loaded."""
LEAST = 16
"""Kernels sum codes of at least so many weights before they multiply with a scale."""


@dataclass(frozen=True, eq=False)
class KeepCodes(QuantisingPass):
    """Store weights in the codes of their checkpoint."""

    arranged: ArrangedCodes
    names: Mapping[int, str]
    row_bits: int = 8
    chosen: tuple[tuple[Op, Format], ...] = ()
    name: ClassVar[str] = "keep-codes"

    def targets(self, graph: Graph) -> list[tuple[Op, Format]]:
        return list(self.chosen)

    def run(self, program: Program, log: Log) -> Program:
        codes, lines = Codes(program, log.memory), Counter[str]()
        chosen: list[tuple[Op, Format]] = []
        left_out = routers(program.graph)
        for op in program.graph.ops:
            matrices = () if op in left_out else _matrices(op, program)
            parts = [part for m in matrices if (part := self._stored(program.weights[m.name]))]
            if not parts or len(parts) < len(matrices):
                continue
            formats = {part.format for part in parts}
            if len(formats) > 1:
                names = ", ".join(sorted(map(str, formats)))
                log.decline(matrices[0].name, f"its weights have different formats: {names}")
                continue
            format = parts[0].format
            format = replace(format, row_bits=0 if format.kind == "fp8" else self.row_bits)
            chosen.append((op, format))
            for matrix, part in zip(matrices, parts, strict=True):
                if part.codes is not None:
                    codes.calibrated[matrix.name, format, ()] = _in_memory(log.memory, part.codes)
                lines[part.line] += 1
        log.says += [line.format(count) for line, count in sorted(lines.items())]
        return replace(self, chosen=tuple(chosen)).rounded(program, log, codes)

    def quantised(self, op: Op, format: Format, codes: Codes, b: Builder) -> Sequence[Value]:
        if op.name == LINEAR:
            return QuantiseLinears().quantised(op, format, codes, b)
        return QuantiseExperts(format).quantised(op, format, codes, b)

    def _stored(self, weight: Tensor) -> _Part | None:
        """How a weight is stored; None where the checkpoint does not quantise it."""
        name = self.names.get(weight.untyped_storage().data_ptr(), "")
        if name in self.arranged.nearest:
            format, reason = self.arranged.nearest[name]
            return _Part(format, None, reason)
        stored = self.arranged.stored.get(name)
        if stored is None:
            return None
        parts = stored.of_view(weight)
        if parts is None:
            return _Part(nearest_int8(weight.shape[-1]), None, "a pass cut blocks of its codes")
        if stored.format.block % LEAST:
            reason = f"kernels read no blocks of {stored.format.block}"
            return _Part(nearest_int8(weight.shape[-1]), None, reason)
        if not _agrees(stored.format, parts, weight):
            return _Part(nearest_int8(weight.shape[-1]), None, "a pass changed its values")
        return _Part(stored.format, parts)


def _in_memory(memory: InMemory, parts: Quantised) -> Quantised:
    zeros = None if parts.zeros is None else memory.tensor(parts.zeros)
    return Quantised(memory.tensor(parts.codes), memory.tensor(parts.scales), zeros)


@dataclass(frozen=True)
class _Part:
    """The format of a weight; its codes, or the reason why they are not those of the checkpoint."""

    format: Format
    codes: Quantised | None
    reason: str = ""

    @property
    def line(self) -> str:
        if self.codes is not None:
            return f"{{}} weights keep the codes of the checkpoint, as {self.format}"
        return f"{{}} weights are rounded to {self.format}: {self.reason}"


def _agrees(format: Format, parts: Quantised, weight: Tensor) -> bool:
    """Whether codes have the values of a weight [.., N, K], which is rounded to 16 bits or not."""
    if weight.ndim == 2:
        stored = [t for t in (parts.codes, parts.scales, parts.zeros) if t is not None]
        return all(
            torch.allclose(dequantise(format.kind, *codes), w.float(), rtol=ROUNDING, atol=TINY)
            for w, *codes in some_rows(weight, *stored)
        )
    zeros = [None] * len(weight) if parts.zeros is None else parts.zeros
    experts = zip(parts.codes, parts.scales, zeros, weight, strict=True)
    return all(_agrees(format, Quantised(c, s, z), matrix) for c, s, z, matrix in experts)


def _matrices(op: Op, program: Program) -> tuple[Value, ...]:
    """The weights of a product, if all of them are stored."""
    matrices: tuple[Value, ...] = ()
    if op.name == "grouped.linear":
        matrices = GroupedLinear.of(op).matrices
    elif op.name == LINEAR:
        matrices = op.inputs[1:2]
    return matrices if all(m.name in program.weights for m in matrices) else ()
