"""Products with weights of few bits: the rows rounded to codes, then the codes multiplied."""

from __future__ import annotations

from typing import cast

from tvm import relax

from moec.codegen.bodies import vector_body
from moec.codegen.cpu.quantised import quantised_linear
from moec.codegen.cpu.quantised_layout import (
    QuantisedLayout,
    QuantisedSpec,
)
from moec.codegen.generic import scalars as sc
from moec.codegen.kernels.codes import packed_codes, packed_scales, rounded
from moec.codegen.kernels.dense import packed_bias
from moec.codegen.kernels.table import VECTOR_DTYPES, kernel
from moec.codegen.lowering import Lowering
from moec.ir import Graph, Op
from moec.ops.quantised import GroupedQuantised


def quantised_fit(op: Op, graph: Graph) -> bool:
    """Whether codes are params and the body is one that vectors can do."""
    parts = GroupedQuantised.of(op)
    params = set(graph.params)
    return (
        len(parts.matrices) <= 2
        and not op.attrs.get("exact_rows")
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
    arguments = list(rounded(low, parts.x, layout))
    if top_k and parts.order is not None:
        arguments.append(low.value(parts.order))
    arguments.append(low.value(parts.ends))
    arguments.append(low.param(*packed_codes(layout, tuple(m.codes for m in parts.matrices))))
    arguments.append(low.param(*packed_scales(layout, tuple(m.scales for m in parts.matrices))))
    if parts.format.asymmetric:
        zeros = tuple(m.zeros for m in parts.matrices if m.zeros is not None)
        arguments.append(low.param(*packed_scales(layout, zeros)))
    if parts.biases:
        arguments.append(low.param(*packed_bias(layout, parts.biases)))
    if parts.scale is not None:
        arguments.append(low.value(parts.scale))
    low.note(op, name if body is None else f"{name} with {body.name}")
    return low.call(function, arguments, [out.type])
