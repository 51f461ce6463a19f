"""Products with weights of few bits: rows are rounded to codes, then codes are multiplied."""

from __future__ import annotations

from functools import partial

from tvm import relax

from moec.codegen.backend import Rule, require
from moec.codegen.backends.cpu.codes import packed_codes, packed_scales, rounded
from moec.codegen.backends.cpu.sorted_rows import check_products, product
from moec.codegen.cpu.quantised.grouped import quantised_linear
from moec.codegen.cpu.quantised.layout import QuantisedLayout
from moec.codegen.module_builder import Lowering
from moec.codegen.rules.products import spec_of
from moec.codegen.specs.products import QuantisedSpec
from moec.formats.notation import Format
from moec.ir.graph import Graph, Op
from moec.ops.experts.quantised import GroupedQuantised


def check_format(format: Format) -> None:
    """Raises NoMatch for formats whose codes are not integers: these kernels sum integers."""
    require(
        format.kind != "fp8",
        "its weights are fp8, and CPU kernels support int8, int4 and mxfp4: choose one of these, "
        "or a CUDA target",
    )


def _check(op: Op, graph: Graph) -> None:
    """Raises NoMatch unless rows can be rounded to codes, and the stacks have one shape."""
    parts = GroupedQuantised.of(op)
    check_format(parts.format)
    require(not op.attrs.get("exact_rows"), "its rows must not be rounded (:rows16)")
    require(len({m.codes.shape for m in parts.matrices}) == 1, "its stacks differ in shape")
    check_products(op, graph, parts, [v for m in parts.matrices for v in m.values])


def _quantised(low: Lowering, op: Op) -> list[relax.Expr]:
    parts = GroupedQuantised.of(op)
    spec = spec_of(QuantisedSpec, op, parts, format=parts.format)
    layout = QuantisedLayout(spec, low.target)
    rows = rounded(low, parts.x, layout.blocks, layout.row_codes)
    weights = [
        packed_codes(layout, tuple(m.codes for m in parts.matrices)),
        packed_scales(layout, tuple(m.scales for m in parts.matrices)),
    ]
    if zeros := tuple(m.zeros for m in parts.matrices if m.zeros is not None):
        weights.append(packed_scales(layout, zeros))
    make = partial(quantised_linear, low.target, spec)
    return product(
        low, op, parts, parts.format.kind, layout, make, rows, weights, values=layout.tuned
    )


RULES = (Rule("quantised", ("grouped.quantised",), _check, _quantised),)
