"""Products with experts of several formats: rows are rounded once for each size of blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from tvm import relax

from moec.codegen.backend import Rule, require
from moec.codegen.backends.cpu.codes import packed_matrices, rounded
from moec.codegen.backends.cpu.dense import packed_bias
from moec.codegen.backends.cpu.quantised import check_format
from moec.codegen.backends.cpu.sorted_rows import check_products, product
from moec.codegen.cpu.quantised.mixed import MixedLayout, mixed_linear
from moec.codegen.loops import scalars as sc
from moec.codegen.module_builder import Lowering, Param
from moec.codegen.rules.products import spec_of
from moec.codegen.specs.products import MixedSpec
from moec.ir.graph import Graph, Op, TensorType
from moec.ir.ops.experts.mixed import GroupedMixed, MixedPart


def _check(op: Op, graph: Graph) -> None:
    parts = GroupedMixed.of(op)
    for part in parts.parts:
        check_format(part.format)
        require(part.format.kind != "fp8", "fp8 weights multiply rows that are not rounded")
    require(not op.attrs.get("exact_rows"), "its rows must not be rounded (:rows16)")
    one_part = replace(parts, matrices=parts.parts[0].matrices)
    check_products(op, graph, one_part, [v for m in parts.matrices for v in m.values])


def _mixed(low: Lowering, op: Op) -> list[relax.Expr]:
    parts = GroupedMixed.of(op)
    counts = tuple(len(part.experts) for part in parts.parts)
    formats = tuple(part.format for part in parts.parts)
    first = replace(parts, matrices=parts.parts[0].matrices)
    dtype = sc.STORED[parts.x.dtype]
    spec = spec_of(MixedSpec, op, first, dtype, formats=formats, counts=counts)
    layout = MixedLayout(spec, low.target)
    rows = [value for form in layout.forms for value in rounded(low, parts.x, *form)]
    weights: list[tuple[object, Param]] = []
    for part, stored in zip(parts.parts, layout.parts, strict=True):
        weights += packed_matrices(stored, part.matrices)
        if parts.biases:
            weights.append(packed_bias(stored, parts.biases, part.experts))
    weights.append(_table(op, parts.parts))
    make = partial(mixed_linear, low.target, spec)
    plain = replace(first, biases=())
    return product(low, op, plain, "mixed", layout, make, rows, weights, in_slots=False)


def _table(op: Op, parts: tuple[MixedPart, ...]) -> tuple[object, Param]:
    """The table of the kernel (codegen/cpu/quantised/mixed.py)."""
    order = [expert for part in parts for expert in part.experts]
    table = np.zeros((len(order), 3), np.int32)
    table[:, 2] = order
    for number, part in enumerate(parts):
        for position, expert in enumerate(part.experts):
            table[expert, :2] = number, position
    name = f"{op.outputs[0].name}.formats"
    return name, Param(name, TensorType("i32", table.shape), (), lambda: table)


RULES = (Rule("mixed", ("grouped.mixed",), _check, _mixed),)
