"""A graph with other sizes in its types and attributes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import sympy

from moec.ir.graph import Attr, Graph, State, TensorType, Value
from moec.ir.sizes.dims import Dim


def replace_sizes(graph: Graph, size: Callable[[sympy.Expr], Dim]) -> Graph:
    """The graph with `size` of each size that is no number. Bodies of ops and bounds stay."""
    values: dict[Value, Value] = {}

    def dim(old: Dim) -> Dim:
        return old if isinstance(old, int) else size(old)

    def attr(old: Attr) -> Attr:
        if isinstance(old, tuple):
            return tuple(map(attr, old))
        return size(old) if isinstance(old, sympy.Expr) else old

    def value(old: Value) -> Value:
        if old not in values:
            values[old] = Value(old.name, TensorType(old.dtype, tuple(map(dim, old.shape))))
        return values[old]

    ops = tuple(
        replace(
            op,
            inputs=tuple(map(value, op.inputs)),
            outputs=tuple(map(value, op.outputs)),
            attrs={name: attr(old) for name, old in op.attrs.items()},
        )
        for op in graph.ops
    )
    return replace(
        graph,
        inputs=tuple(map(value, graph.inputs)),
        params=tuple(map(value, graph.params)),
        ops=ops,
        outputs=tuple(map(value, graph.outputs)),
        states=tuple(State(value(s.before), value(s.after)) for s in graph.states),
    )
