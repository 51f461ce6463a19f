"""Inlining: the body of an expert as ops of the graph, over the rows of one expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import sympy

from moec.ir.graph import Attr, Graph, Op, TensorType, Value
from moec.ir.sizes.dims import Dim, canonical, symbol, symbols
from moec.passes.core.moe_layer import Splice


def inline_body(
    splice: Splice, body: Graph, rows: Value, params: Mapping[Value, Value], origin: str
) -> tuple[list[Op], Value]:
    """The ops that compute the body for `rows` [T, D] with `params` for its params, and the
    value that holds the result."""
    names = symbols(body.inputs[0].shape[0])
    count = rows.shape[0]
    sizes = {symbol(name): count for name in names}

    def dim(d: Dim) -> Dim:
        return d if isinstance(d, int) else canonical(d.subs(sizes))

    def attr(value: Attr) -> Attr:
        if isinstance(value, tuple):
            return tuple(map(attr, value))
        return dim(value) if isinstance(value, sympy.Expr) else value

    new: dict[Value, Value] = {body.inputs[0]: rows, **params}
    ops: list[Op] = []
    for op in body.ops:
        outputs = tuple(
            splice.value(v.name, TensorType(v.dtype, tuple(map(dim, v.shape)))) for v in op.outputs
        )
        attrs = {name: attr(value) for name, value in op.attrs.items()}
        inputs = tuple(new[v] for v in op.inputs)
        ops.append(replace(op, inputs=inputs, outputs=outputs, attrs=attrs, origin=origin))
        new |= dict(zip(op.outputs, outputs, strict=True))
    return ops, new[body.outputs[0]]
