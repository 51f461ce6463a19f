"""The weights of experts become numbers of few bits: opt-in, and approximate.

    h = grouped.linear(x, ends, gate, up, order)      h = grouped.quantised(x, ends,
                                                            gate.codes, gate.scales,
      gate: f32[E, H, D]                       ->           up.codes, up.scales, order)
      up:   f32[E, H, D]                                gate.codes: u8[E, H, D]
                                                        gate.scales: bf16[E, H, D/block]

Experts are where the bytes of an MoE model are, and decoding reads each chosen one whole: int8
halves and int4 quarters what bf16 reads. Whole stacks are quantised at once, so an expert is
quantised with all others or not at all. Routers, norms and the head stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.errors import NoMatch
from moec.formats.integer import Format
from moec.ir.graph import Graph, Op, Value
from moec.ops.grouped import GroupedLinear
from moec.passes.core.rewrite import Builder
from moec.passes.quantise.codes import WIDE, Codes, Quantising, attributes


@dataclass(frozen=True)
class QuantiseExperts(Quantising):
    """Store the weights of experts in few bits, as --quant asks."""

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
