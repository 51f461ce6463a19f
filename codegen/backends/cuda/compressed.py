"""Products of experts with compressed weights: rows are rounded to 16 bits, and warps decode the
weights."""

from __future__ import annotations

from typing import cast

import numpy as np
from tvm import relax
from tvm.tirx import PrimFunc

from moec.codegen.backend import Rule, require
from moec.codegen.backends.cuda.bodies import epilogue, text
from moec.codegen.backends.cuda.experts import check_experts, of_owned_rows
from moec.codegen.backends.cuda.products import stack
from moec.codegen.backends.cuda.quantised import rounded
from moec.codegen.cuda.quantised.compressed import check_compressed, compressed_linear
from moec.codegen.loops import scalars as sc
from moec.codegen.module_builder import Lowering, Param
from moec.codegen.rules.products import spec_of
from moec.codegen.specs.products import CompressedSpec
from moec.formats.ternary import bytes_of_counts
from moec.formats.ternary_code import CODEWORDS, dictionary, masks
from moec.ir.graph import Graph, Op, TensorType
from moec.ops.experts.compressed import X_BITS, GroupedCompressed

_TABLE = Param(
    "ternary.masks",
    TensorType("i64", (CODEWORDS,)),
    (),
    lambda: masks(dictionary().entries).view(np.int64),
)
"""The dictionary of the decoder, stored once per package."""


def _spec(op: Op, parts: GroupedCompressed) -> CompressedSpec:
    counts: tuple[int, ...] = ()
    if parts.kind == "ternary":
        starts = (cast(tuple[int, int], matrix[1].shape) for matrix in parts.matrices)
        counts = tuple(map(bytes_of_counts, starts))
    dtype = sc.STORED[op.outputs[0].dtype]
    return spec_of(CompressedSpec, op, parts, dtype=dtype, kind=parts.kind, bytes_of_counts=counts)


def _check_product(op: Op, graph: Graph) -> None:
    parts = GroupedCompressed.of(op)
    stored = [value for matrix in parts.matrices for value in matrix]
    check_experts(op, parts, stored, graph)
    grids = all(matrix[-1].dtype == "bf16" for matrix in parts.matrices)
    require(grids, "its rows have values that are not bf16")
    same = all(bias.dtype == op.outputs[0].dtype for bias in parts.biases)
    require(same, "its biases differ from the result in dtype")
    check_compressed(_spec(op, parts), None if op.body is None else epilogue(op.body))


def _compressed(low: Lowering, op: Op) -> list[relax.Expr]:
    parts = GroupedCompressed.of(op)
    spec = _spec(op, parts)
    top_k = cast(int, op.attrs.get("gather", 0))
    join = None if op.body is None else epilogue(op.body)

    def make(name: str) -> PrimFunc:
        return compressed_linear(spec, low.target, epilogue=join, top_k=top_k, name=name)

    arguments: list[relax.Expr] = []
    if parts.kind == "ternary":
        arguments.append(low.param(_TABLE.name, _TABLE))
    arguments += [low.value(value) for matrix in parts.matrices for value in matrix[:-1]]
    arguments += rounded(low, parts.x, spec.k, 1, X_BITS)
    if parts.order is not None:
        arguments.append(low.value(parts.order))
    arguments += [low.value(parts.ends), stack(low, tuple(m[-1] for m in parts.matrices))]
    if parts.biases:
        arguments.append(stack(low, parts.biases))
    key = ("compressed", spec, top_k, None if op.body is None else text(op.body))
    low.note(op, "ternary" if parts.kind == "ternary" else "two_bits")
    return low.call(low.function(key, "compressed", make), arguments, [op.outputs[0].type])


RULES = (Rule("compressed", ("grouped.compressed",), of_owned_rows(_check_product), _compressed),)
