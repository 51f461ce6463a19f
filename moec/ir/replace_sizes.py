"""A graph with other sizes in its types and attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import sympy

from moec.ir.graph import Attr, Graph, Op, State, TensorType, Value
from moec.ir.sizes.dims import Dim
from moec.ir.sizes.floats import is_float


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


def size_expressions(op: Op) -> Iterator[sympy.Expr]:
    """The sizes in the attributes and results of an op that are no numbers."""
    for attr in op.attrs.values():
        yield from _in_attr(attr)
    for value in op.outputs:
        yield from (dim for dim in value.shape if not isinstance(dim, int))


def _in_attr(attr: Attr) -> Iterator[sympy.Expr]:
    if isinstance(attr, tuple):
        for item in attr:
            yield from _in_attr(item)
    elif isinstance(attr, sympy.Expr):
        yield attr


def indicator(condition: sympy.Basic) -> sympy.Expr | None:
    """1 where a condition on integers holds, else 0, as an expression of sizes; None for a
    condition on floats."""
    if isinstance(condition, sympy.And | sympy.Or | sympy.Not):
        parts = [part for part in map(indicator, condition.args) if part is not None]
        if len(parts) < len(condition.args):
            return None
        if isinstance(condition, sympy.And):
            return sympy.Mul(*parts)
        if isinstance(condition, sympy.Or):
            return 1 - sympy.Mul(*(1 - part for part in parts))
        return 1 - parts[0]
    if not isinstance(condition, sympy.core.relational.Relational) or is_float(condition):
        return None
    if not condition.lhs.is_integer or not condition.rhs.is_integer:
        return None
    difference = condition.lhs - condition.rhs
    match condition.rel_op:
        case ">":
            return sympy.Min(1, sympy.Max(0, difference))
        case "<":
            return sympy.Min(1, sympy.Max(0, -difference))
        case ">=":
            return 1 - sympy.Min(1, sympy.Max(0, -difference))
        case "<=":
            return 1 - sympy.Min(1, sympy.Max(0, difference))
        case "!=":
            return sympy.Min(1, sympy.Abs(difference))
    return 1 - sympy.Min(1, sympy.Abs(difference))
