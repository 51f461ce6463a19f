"""The weights of experts are quantised to few bits: opt-in and approximate.

    h = grouped.linear(x, ends, gate, up, order)      h = grouped.quantised(x, ends,
                                                            gate.codes, gate.scales,
      gate: f32[E, H, D]                       ->           up.codes, up.scales, order)
      up:   f32[E, H, D]                                gate.codes: u8[E, H, D]
                                                        gate.scales: bf16[E, H, D/block]

Experts hold most bytes of an MoE model, and decoding reads all weights of each chosen expert: int8
halves and int4 quarters the bytes of bf16. A stack is quantised as one, so that an expert is
quantised together with all others or not at all. Routers, norms and the head are not changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.errors import NoMatch
from moec.ir.formats.notation import Format
from moec.ir.graph import Graph, Op, Value
from moec.ir.ops.experts.grouped import GroupedLinear
from moec.passes.core.rewrite import Builder
from moec.passes.quantise.codes import WIDE, Codes, QuantisingPass, attributes


@dataclass(frozen=True)
class QuantiseExperts(QuantisingPass):
    """Store the weights of experts in few bits (--quant)."""

    format: Format
    name: ClassVar[str] = "quantise-experts"

    def targets(self, graph: Graph) -> list[tuple[Op, Format]]:
        return [(op, self.format) for op in graph.ops if op.name == "grouped.linear"]

    def quantised(self, op: Op, format: Format, codes: Codes, b: Builder) -> Sequence[Value]:
        parts = GroupedLinear.of(op)
        for matrix in parts.matrices:
            codes.check(matrix, format)
            if parts.x.dtype not in WIDE:
                raise NoMatch(f"the rows {parts.x} are not of {', '.join(WIDE)}")
            if matrix.shape != parts.matrices[0].shape:
                raise NoMatch(
                    f"the weights {matrix.name} and {parts.matrices[0].name} differ in shape"
                )
        values = [v for matrix in parts.matrices for v in codes.params(matrix, format, b)]
        attrs = {**op.attrs, **attributes(format)}
        inputs = parts.storing(values)
        return b.emit("grouped.quantised", inputs, like=op, attrs=attrs, body=op.body)
