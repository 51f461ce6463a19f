"""Compressed weights are decoded inside the product that reads them.

    w = moe.decompress(stream, starts, grid)
    y = grouped.linear(x, ends, w)              ->   y = grouped.compressed(x, ends, stream,
                                                                            starts, grid)

The decoded weights are never stored: a product of few rows is bound by reading its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moec.errors import NoMatch
from moec.ir.graph import Attr, Op, Program, Value
from moec.ir.ops.experts.grouped import GroupedLinear
from moec.passes.core.rewrite import Builder, rewrite
from moec.passes.core.runner import Log, Pass


@dataclass(frozen=True)
class FuseDecompress(Pass):
    """Decode compressed weights of experts inside the products that read them."""

    name: ClassVar[str] = "fuse-decompress"

    def run(self, program: Program, log: Log) -> Program:
        return Program(rewrite(program.graph, fuse_decompress, log), program.weights)


def fuse_decompress(op: Op, b: Builder) -> Sequence[Value] | None:
    if op.name != "grouped.linear":
        return None
    parts = GroupedLinear.of(op)
    sources = [b.producers.get(matrix) for matrix in parts.matrices]
    decompressed = [s for s in sources if s is not None and s.name == "moe.decompress"]
    if not decompressed:
        return None
    if (
        len(decompressed) < len(sources)
        or len({source.attrs["kind"] for source in decompressed}) > 1
    ):
        raise NoMatch("the matrices of one product are not all compressed in one way")
    stored = [value for source in decompressed for value in source.inputs]
    attrs: dict[str, Attr] = {**op.attrs, "kind": decompressed[0].attrs["kind"]}
    inputs = parts.storing(stored)
    return b.emit("grouped.compressed", inputs, like=op, attrs=attrs, body=op.body)
