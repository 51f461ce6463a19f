"""Products with compressed weights: rows are rounded to 16 bits, and weights decoded in the
kernel."""

from __future__ import annotations

from functools import partial
from typing import cast

from tvm import relax

from moec.codegen.backend import Rule
from moec.codegen.backends.cpu.codes import rounded
from moec.codegen.backends.cpu.sorted_rows import check_products, product
from moec.codegen.cpu.compressed.grouped import compressed_linear
from moec.codegen.cpu.compressed.weights import table
from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.quantised.layout import PAIRS
from moec.codegen.module_builder import Lowering, Param
from moec.codegen.rules.products import spec_of
from moec.codegen.specs.products import CompressedSpec
from moec.ir.formats.ternary import bytes_of_counts
from moec.ir.graph import Graph, Op, TensorType
from moec.ir.ops.experts.compressed import GroupedCompressed
from moec.target.cpu import CpuTarget


def _check(op: Op, graph: Graph) -> None:
    parts = GroupedCompressed.of(op)
    check_products(op, graph, parts, [value for matrix in parts.matrices for value in matrix])


def _compressed(low: Lowering, op: Op) -> list[relax.Expr]:
    parts = GroupedCompressed.of(op)
    spec = spec_of(CompressedSpec, op, parts, bytes_of_counts=_bytes_of_counts(parts))
    rows = rounded(low, parts.x, form=PAIRS)
    entries = _dictionary(low.target)
    weights: list[tuple[object, Param]] = [(entries.name, entries)]
    values = [value for matrix in parts.matrices for value in matrix]
    weights += [(value, Param(value.name, value.type, (value,))) for value in values]
    make = partial(compressed_linear, low.target, spec)
    layout = Layout(spec, low.target)
    return product(low, op, parts, "ternary", layout, make, rows, weights, in_slots=False)


def _bytes_of_counts(parts: GroupedCompressed) -> tuple[int, ...]:
    """The width in bytes of the counts in the starts of each stack; the starts are its second
    part."""
    return tuple(
        bytes_of_counts(cast(tuple[int, int], matrix[1].shape)) for matrix in parts.matrices
    )


def _dictionary(target: CpuTarget) -> Param:
    """The dictionary of the decoder, stored once per package."""
    dictionary = table(target)
    kind = {"int64": "i64", "int8": "i8"}[str(dictionary.dtype)]
    name = "ternary.signs" if kind == "i8" else "ternary.masks"
    return Param(name, TensorType(kind, dictionary.shape), (), lambda: dictionary)


RULES = (Rule("compressed", ("grouped.compressed",), _check, _compressed),)
