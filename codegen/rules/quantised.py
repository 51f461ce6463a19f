"""Products with weights of few bits: the rows rounded to codes, then the codes multiplied."""

from __future__ import annotations

from functools import partial

from tvm import relax

from moec.codegen.cpu.quantised.grouped import quantised_linear
from moec.codegen.cpu.quantised.layout import QuantisedLayout, QuantisedSpec
from moec.codegen.module_builder import Lowering
from moec.codegen.rules.codes import packed_codes, packed_scales, rounded
from moec.codegen.rules.sorted_rows import fits, product, spec_of
from moec.codegen.rules.table import kernel
from moec.ir.graph import Graph, Op
from moec.ops.quantised import GroupedQuantised


def quantised_fit(op: Op, graph: Graph) -> bool:
    """Whether a kernel can do it, with rows rounded and stacks of one shape."""
    parts = GroupedQuantised.of(op)
    alike = len({m.codes.shape for m in parts.matrices}) == 1
    stored = [v for m in parts.matrices for v in m.values]
    return not op.attrs.get("exact_rows") and alike and fits(op, graph, parts, stored)


@kernel("grouped.quantised", takes=quantised_fit)
def _quantised(low: Lowering, op: Op) -> list[relax.Expr]:
    parts = GroupedQuantised.of(op)
    spec = spec_of(QuantisedSpec, op, parts, format=parts.format)
    layout = QuantisedLayout(spec, low.target)
    rows = rounded(low, parts.x, layout.blocks, layout.row_codes)
    weights = [
        low.param(*packed_codes(layout, tuple(m.codes for m in parts.matrices))),
        low.param(*packed_scales(layout, tuple(m.scales for m in parts.matrices))),
    ]
    if zeros := tuple(m.zeros for m in parts.matrices if m.zeros is not None):
        weights.append(low.param(*packed_scales(layout, zeros)))
    make = partial(quantised_linear, low.target, spec)
    return product(
        low, op, parts, parts.format.kind, layout, make, rows, weights, values=layout.tuned
    )
