"""Products with weights of few bits: rows are rounded to codes, then codes are multiplied; those of
fp8 weights stay floats."""

from __future__ import annotations

from functools import partial

from tvm import relax

from moec.codegen.backend import Rule, require
from moec.codegen.backends.cpu.codes import packed_matrices, rows_for
from moec.codegen.backends.cpu.sorted_rows import check_products, product
from moec.codegen.cpu.quantised.grouped import quantised_linear
from moec.codegen.cpu.quantised.layout import QuantisedLayout
from moec.codegen.cpu.quantised.words import quads_of
from moec.codegen.loops import scalars as sc
from moec.codegen.module_builder import Lowering
from moec.codegen.rules.products import spec_of
from moec.codegen.specs.products import QuantisedSpec
from moec.ir.formats.notation import Format
from moec.ir.graph import Graph, Op
from moec.ir.ops.experts.quantised import GroupedQuantised


def check_format(format: Format) -> None:
    """Raises NoMatch where rows are not in the form that kernels multiply: integers, or with fp8
    weights floats. All codes of a unit of words belong to one scale."""
    floats, bits = format.kind == "fp8", format.row_bits
    why = f"its rows are rounded to {bits} bits, and CPU kernels do not round those of fp8 weights"
    require(bits == 0 or not floats, f"{why}: compile for CPUs alone, or choose int8")
    require(bits != 0 or floats, f"its rows are not rounded, as CPU kernels of {format.kind} need")
    fits = format.block % (4 * quads_of(format.bits)) == 0
    require(fits, f"its blocks are of {format.block} weights")


def _check(op: Op, graph: Graph) -> None:
    """Raises NoMatch unless rows can be rounded to codes, and the stacks have one shape."""
    parts = GroupedQuantised.of(op)
    check_format(parts.format)
    require(not op.attrs.get("exact_rows"), "its rows must not be rounded (:rows16)")
    require(len({m.codes.shape for m in parts.matrices}) == 1, "its stacks differ in shape")
    check_products(op, graph, parts, [v for m in parts.matrices for v in m.values])


def _quantised(low: Lowering, op: Op) -> list[relax.Expr]:
    parts = GroupedQuantised.of(op)
    spec = spec_of(QuantisedSpec, op, parts, sc.STORED[parts.x.dtype], format=parts.format)
    layout = QuantisedLayout(spec, low.target)
    rows, weights = rows_for(low, parts.x, layout), packed_matrices(layout, parts.matrices)
    make = partial(quantised_linear, low.target, spec)
    return product(low, op, parts, parts.format.kind, layout, make, rows, weights)


RULES = (Rule("quantised", ("grouped.quantised",), _check, _quantised),)
