"""Products with weights of few bits: the rows rounded to codes, then the codes multiplied."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from tvm import relax

from moec.codegen.bodies import vector_body
from moec.codegen.cpu.quantised import quantised_linear
from moec.codegen.cpu.quantised_layout import (
    QuantisedLayout,
    QuantisedSpec,
    pack_codes,
    pack_scales,
)
from moec.codegen.cpu.round_rows import round_rows
from moec.codegen.generic import scalars as sc
from moec.codegen.kernels.dense import packed_bias
from moec.codegen.kernels.table import VECTOR_DTYPES, kernel
from moec.codegen.lowering import Lowering, Param
from moec.ir import Graph, Op, TensorType, Value
from moec.ops.quantised import GroupedQuantised


def quantised_fit(op: Op, graph: Graph) -> bool:
    """Whether codes are params and the body is one that vectors can do."""
    parts = GroupedQuantised.of(op)
    params = set(graph.params)
    return (
        len(parts.matrices) <= 2
        and all(v in params for m in parts.matrices for v in m.values)
        and all(b in params for b in parts.biases)
        and len({m.codes.shape for m in parts.matrices}) == 1
        and parts.x.dtype in VECTOR_DTYPES
        and (op.body is None or vector_body(op.body) is not None)
    )


@kernel("grouped.quantised", takes=quantised_fit)
def _quantised(low: Lowering, op: Op) -> list[relax.Expr]:
    parts, out = GroupedQuantised.of(op), op.outputs[0]
    count, n, k = cast(tuple[int, int, int], parts.matrices[0].codes.shape)
    spec = QuantisedSpec(
        n,
        k,
        "float32",
        sc.STORED[out.dtype],
        groups=count,
        gated=len(parts.matrices) == 2,
        bias=bool(parts.biases),
        format=parts.format,
    )
    layout = QuantisedLayout(spec, low.target)
    top_k = cast(int, op.attrs.get("gather", 0))
    scale = sc.STORED[parts.scale.dtype] if parts.scale is not None else None
    body = None if op.body is None else vector_body(op.body)
    name = f"{parts.format.kind}_gathered" if top_k else f"{parts.format.kind}_grouped"
    function = low.function(
        (spec, top_k, scale, None if body is None else body.text),
        name if body is None else f"{name}_{body.name}",
        lambda name: quantised_linear(
            low.target,
            spec,
            top_k,
            None if body is None else body.epilogue(low.target),
            scale,
            name,
        ),
    )
    arguments = _rounded(low, parts.x, layout)
    if top_k and parts.order is not None:
        arguments.append(low.value(parts.order))
    arguments.append(low.value(parts.ends))
    arguments.append(low.param(*_codes(layout, tuple(m.codes for m in parts.matrices))))
    arguments.append(low.param(*_scales(layout, tuple(m.scales for m in parts.matrices))))
    if parts.format.asymmetric:
        zeros = tuple(m.zeros for m in parts.matrices if m.zeros is not None)
        arguments.append(low.param(*_scales(layout, zeros)))
    if parts.biases:
        arguments.append(low.param(*packed_bias(layout, parts.biases)))
    if parts.scale is not None:
        arguments.append(low.value(parts.scale))
    low.note(op, name if body is None else f"{name} with {body.name}")
    return low.call(function, arguments, [out.type])


def _rounded(low: Lowering, x: Value, layout: QuantisedLayout) -> list[relax.Expr]:
    """Codes, scales and sums of the rows of x."""
    rows, width = x.shape
    assert isinstance(width, int)
    dtype, blocks = sc.STORED[x.dtype], layout.blocks
    function = low.function(
        ("round_rows", width, blocks, dtype),
        "round_rows",
        lambda name: round_rows(low.target, width, blocks, dtype, name),
    )
    types = [
        TensorType("i32", (rows, layout.x_words)),
        TensorType("f32", (rows, blocks)),
        TensorType("i32", (rows, blocks)),
    ]
    return low.call(function, [low.value(x)], types)


def _codes(layout: QuantisedLayout, codes: tuple[Value, ...]) -> tuple[object, Param]:
    def make(*tensors: torch.Tensor) -> np.ndarray[Any, Any]:
        return pack_codes(layout, *tensors)

    type = TensorType("i32", layout.shape)
    return (layout, codes), Param(_name(codes), type, codes, make)


def _scales(layout: QuantisedLayout, scales: tuple[Value, ...]) -> tuple[object, Param]:
    def make(*tensors: torch.Tensor) -> np.ndarray[Any, Any]:
        return pack_scales(layout, *tensors)

    type = TensorType(scales[0].dtype, layout.scale_shape)
    return (layout, scales), Param(_name(scales), type, scales, make)


def _name(values: tuple[Value, ...]) -> str:
    return "+".join(value.name for value in values) + ".packed"
