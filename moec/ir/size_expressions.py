"""The expressions of sizes in a graph."""

from __future__ import annotations

from collections.abc import Iterator

import sympy

from moec.ir.graph import Attr, Op


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
