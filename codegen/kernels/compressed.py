"""Products with compressed weights: rows rounded to 16 bits, weights decoded on the way."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from tvm import relax

from moec.codegen.bodies import vector_body
from moec.codegen.cpu.compressed import compressed_linear
from moec.codegen.cpu.layout import Layout
from moec.codegen.cpu.masks import CompressedSpec
from moec.codegen.cpu.quantised_layout import row_words
from moec.codegen.cpu.round_rows import round_rows
from moec.codegen.generic import scalars as sc
from moec.codegen.kernels.dense import packed_bias
from moec.codegen.kernels.table import VECTOR_DTYPES, kernel
from moec.codegen.lowering import Lowering, Param
from moec.ir import Graph, Op, TensorType
from moec.ops.compressed import X_BITS, GroupedCompressed
from moec.ternary_dictionary import CODEWORDS, dictionary, masks


def compressed_fit(op: Op, graph: Graph) -> bool:
    """Whether all parts are params and the body is one that vectors can do."""
    parts = GroupedCompressed.of(op)
    params = set(graph.params)
    return (
        len(parts.matrices) <= 2
        and all(v in params for matrix in parts.matrices for v in (*matrix, *parts.biases))
        and parts.x.dtype in VECTOR_DTYPES
        and (op.body is None or vector_body(op.body) is not None)
    )


@kernel("grouped.compressed", takes=compressed_fit)
def _compressed(low: Lowering, op: Op) -> list[relax.Expr]:
    parts, out = GroupedCompressed.of(op), op.outputs[0]
    count, n, _ = cast(tuple[int, int, int], parts.matrices[0][-1].shape)
    spec = CompressedSpec(
        n,
        cast(int, parts.x.shape[1]),
        "float32",
        sc.STORED[out.dtype],
        groups=count,
        gated=len(parts.matrices) == 2,
        bias=bool(parts.biases),
        kind=parts.kind,
    )
    top_k = cast(int, op.attrs.get("gather", 0))
    scale = sc.STORED[parts.scale.dtype] if parts.scale is not None else None
    body = None if op.body is None else vector_body(op.body)
    word = {"ternary": "ternary", "2bit": "two_bits"}[parts.kind]
    name = f"{word}_gathered" if top_k else f"{word}_grouped"
    function = low.function(
        (spec, top_k, scale, None if body is None else body.text),
        name if body is None else f"{name}_{body.name}",
        lambda name: compressed_linear(
            low.target,
            spec,
            top_k,
            None if body is None else body.epilogue(low.target),
            scale,
            name,
        ),
    )
    arguments = _rounded(low, parts, spec)
    if top_k and parts.order is not None:
        arguments.append(low.value(parts.order))
    arguments.append(low.value(parts.ends))
    if parts.kind == "ternary":
        arguments.append(low.param("ternary.masks", _MASKS))
    arguments += [low.value(value) for matrix in parts.matrices for value in matrix]
    if parts.biases:
        arguments.append(low.param(*packed_bias(Layout(spec, low.target), parts.biases)))
    if parts.scale is not None:
        arguments.append(low.value(parts.scale))
    low.note(op, name if body is None else f"{name} with {body.name}")
    return low.call(function, arguments, [out.type])


def _rounded(low: Lowering, parts: GroupedCompressed, spec: CompressedSpec) -> list[relax.Expr]:
    """Codes, scales and sums of the rows of x."""
    rows, dtype = parts.x.shape[0], sc.STORED[parts.x.dtype]
    function = low.function(
        ("round_rows", spec.k, X_BITS, dtype),
        "round_rows",
        lambda name: round_rows(low.target, spec.k, 1, dtype, name, X_BITS),
    )
    types = [
        TensorType("i32", (rows, row_words(spec.k, X_BITS))),
        TensorType("f32", (rows, 1)),
        TensorType("i32", (rows, 1)),
    ]
    return low.call(function, [low.value(parts.x)], types)


def _masks() -> np.ndarray[Any, Any]:
    return masks(dictionary().entries).view(np.int64)


_MASKS = Param("ternary.masks", TensorType("i64", (CODEWORDS,)), (), _masks)
"""The one dictionary, as kernels read it: 512 KiB, once in a package."""
