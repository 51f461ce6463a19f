"""Products of experts with weights of few bits: rows are rounded, and weights widened in
registers."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
import torch
from tvm import relax
from tvm.tirx import PrimFunc

from moec.codegen.backend import Rule, require
from moec.codegen.backends.cuda import unpack
from moec.codegen.backends.cuda.bodies import epilogue
from moec.codegen.backends.cuda.experts import check_experts, of_owned_rows
from moec.codegen.backends.cuda.products import LEAST, stack
from moec.codegen.cpu.epilogue import body_text
from moec.codegen.cuda.gemm.product import interleave
from moec.codegen.cuda.quantised.codes import pack
from moec.codegen.cuda.quantised.grouped_codes import check_grouped_codes, grouped_codes
from moec.codegen.cuda.quantised.round_rows import planes_of, round_rows
from moec.codegen.loops import scalars as sc
from moec.codegen.module_builder import Lowering, Param, as_array
from moec.codegen.rules.products import spec_of
from moec.codegen.specs.products import QuantisedSpec
from moec.errors import NoMatch
from moec.ir.graph import Graph, Op, TensorType, Value
from moec.ir.ops.experts.quantised import GroupedQuantised


def _spec(op: Op, parts: GroupedQuantised) -> QuantisedSpec:
    return spec_of(
        QuantisedSpec, op, parts, dtype=sc.STORED[op.outputs[0].dtype], format=parts.format
    )


def _check_product(op: Op, graph: Graph) -> None:
    parts = GroupedQuantised.of(op)
    require(not op.attrs.get("exact_rows"), "its rows must not be rounded (:rows16)")
    require(parts.format.row_bits != 0, "its rows must not be rounded (row_bits=0, for CPUs)")
    stored = [value for matrix in parts.matrices for value in matrix.values]
    check_experts(op, parts, stored, graph)
    shapes = {m.codes.shape for m in parts.matrices}
    require(len(shapes) == 1, "its stacks differ in shape")
    same = all(bias.dtype == op.outputs[0].dtype for bias in parts.biases)
    require(same, "its biases differ from the result in dtype")
    join = None if op.body is None else epilogue(op.body)
    check_grouped_codes(_spec(op, parts), LEAST, join)


def _quantised(low: Lowering, op: Op) -> list[relax.Expr]:
    parts = GroupedQuantised.of(op)
    spec = _spec(op, parts)
    top_k = cast(int, op.attrs.get("gather", 0))
    join = None if op.body is None else epilogue(op.body)

    def make(name: str) -> PrimFunc:
        return grouped_codes(spec, low.target, epilogue=join, top_k=top_k, name=name)

    arguments = [stack(low, tuple(m.scales for m in parts.matrices))]
    if zeros := tuple(m.zeros for m in parts.matrices if m.zeros is not None):
        arguments.append(stack(low, zeros))
    blocks, bits = spec.format.blocks(spec.k), spec.format.row_bits
    arguments += rounded(low, parts.x, spec.k, blocks, bits)
    if parts.order is not None:
        arguments.append(low.value(parts.order))
    codes = tuple(m.codes for m in parts.matrices)
    arguments += [low.value(parts.ends), _packed(low, codes, spec.format.bits)]
    if parts.biases:
        arguments.append(stack(low, parts.biases))
    key = ("codes", spec, top_k, None if op.body is None else body_text(op.body))
    low.note(op, spec.format.kind)
    return low.call(low.function(key, "codes", make), arguments, [op.outputs[0].type])


def rounded(low: Lowering, x: Value, k: int, blocks: int, bits: int) -> tuple[relax.Expr, ...]:
    """Scales and codes of the rows [.., k], computed once for all ops that read them."""
    key = (x, blocks, bits)
    if key not in low.rounded:
        dtype, rows = sc.STORED[x.dtype], x.shape[0]

        def make(name: str) -> PrimFunc:
            return round_rows(k, blocks, bits, dtype, low.target, name)

        function = low.function(("round_rows", k, blocks, bits, dtype), "round_rows", make)
        types = [
            TensorType("f32", (rows, blocks)),
            TensorType("f16", (rows, planes_of(bits) * k)),
        ]
        low.rounded[key] = low.call(function, [low.value(x)], types)
    return tuple(low.rounded[key])


def _packed(low: Lowering, codes: tuple[Value, ...], bits: int) -> relax.Expr:
    experts, n, k = cast(tuple[int, int, int], codes[0].shape)
    name = "+".join(value.name for value in codes) + ".packed"
    type = TensorType("u8", (experts, n * len(codes), k * bits // 8))

    def make(*tensors: torch.Tensor) -> np.ndarray[Any, Any]:
        arrays = [pack(as_array(tensor), bits) for tensor in tensors]
        return arrays[0] if len(arrays) == 1 else interleave(*arrays)

    param = Param(name, type, codes, make, unpack=partial(unpack.codes, bits))
    return low.param(("packed", codes), param)


def _refuse_mixed(op: Op, graph: Graph) -> None:
    raise NoMatch("experts of several formats have kernels for CPUs only: choose one for a product")


RULES = (
    Rule("quantised", ("grouped.quantised",), of_owned_rows(_check_product), _quantised),
    Rule("mixed", ("grouped.mixed",), _refuse_mixed, _quantised),
)
