"""Sizes that the runtime computes: roots, logarithms and powers, exactly as Python does.

    slice: f32[isqrt(T), 8]     becomes     slice: f32[size_0, 8],  size_0 = isqrt(T)

Kernels take such a size as they take any other name. Machine code has no logarithm that rounds as
Python's on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy

from moec.ir.graph import Graph
from moec.ir.replace_sizes import replace_sizes
from moec.ir.sizes.dims import Dim, canonical
from moec.ir.sizes.floats import check, has_wide_numbers, is_float
from moec.ir.sizes.functions import IntegerFunction, uses_functions


@dataclass
class _Names:
    """The name of each size that the runtime computes, none of `reserved`."""

    reserved: frozenset[str]
    names: dict[sympy.Expr, sympy.Symbol] = field(default_factory=dict)

    def replaced(self, size: sympy.Expr) -> sympy.Expr:
        if not _is_for_host(size):
            return size
        inexact = is_float(size) or has_wide_numbers(size)
        if isinstance(size, IntegerFunction) or (_rounds(size) and inexact):
            if size not in self.names:
                self.names[size] = self._new(size)
            return self.names[size]
        return size.func(*map(self.replaced, size.args))

    def _new(self, size: sympy.Expr) -> sympy.Symbol:
        number = len(self.names)
        while f"size_{number}" in self.reserved:
            number += len(self.names) + 1
        return sympy.Symbol(f"size_{number}", integer=True, nonnegative=size.is_nonnegative)


def with_host_sizes(graph: Graph) -> tuple[Graph, Mapping[str, sympy.Expr]]:
    """The graph with a name for each size that the runtime computes, and what the names mean."""
    names = _Names(frozenset(graph.bounds))

    def size(dim: sympy.Expr) -> Dim:
        return canonical(names.replaced(dim))

    result = replace_sizes(graph, size)
    if not names.names:
        return graph, {}
    return result, {symbol.name: size for size, symbol in names.names.items()}


def _rounds(size: sympy.Expr) -> bool:
    return type(size).__name__ in ("floor", "ceiling", "rint")


def _is_for_host(size: sympy.Expr) -> bool:
    if uses_functions(size) or (
        has_wide_numbers(size) and any(map(_rounds, sympy.preorder_traversal(size)))
    ):
        return True
    try:
        check(size)
    except ValueError:  # several operations on doubles, of which kernels know one at a time
        return True
    return False
