"""A graph in float32: the same computation without the roundings of bf16 and f16."""

from __future__ import annotations

import re

from moec.ir.graph import Attr, DType, Graph, Op, TensorType, Value


def widen(graph: Graph) -> Graph:
    """The same graph with every bf16 and f16 in types and attributes as f32."""
    new: dict[Value, Value] = {}

    def wide(value: Value) -> Value:
        if value not in new:
            type = TensorType(_wide_name(value.dtype), value.shape)
            new[value] = value if type == value.type else Value(value.name, type)
        return new[value]

    ops = tuple(
        Op(
            op.name,
            tuple(map(wide, op.inputs)),
            tuple(map(wide, op.outputs)),
            {name: _wide_attr(name, value) for name, value in op.attrs.items()},
            widen(op.body) if op.body is not None else None,
            op.origin,
        )
        for op in graph.ops
    )
    return Graph(
        tuple(map(wide, graph.inputs)),
        tuple(map(wide, graph.params)),
        ops,
        tuple(map(wide, graph.outputs)),
        (),
        graph.bounds,
        graph.name,
    )


def _wide_name(dtype: str) -> str:
    return "f32" if dtype in ("bf16", "f16") else dtype


def _wide_attr(name: str, value: Attr) -> Attr:
    match value:
        case DType(dtype):
            return DType(_wide_name(dtype))
        case str() if name == "body":
            return re.sub(r"\b(bf16|f16)\b", "f32", value)
        case str() if name in ("dtype", "score_dtype", "choice_dtype"):  # Routing's are names
            return _wide_name(value)
        case _:
            return value
