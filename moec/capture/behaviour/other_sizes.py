"""Compares a description with its module at the sizes at which the module's own code changes.

A description is proved on inputs of certain sizes. Where the code of the module was traced, if only
in part, its guards and the sizes in its graph say where else it may compute something different.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import sympy

from moec.capture.captured import Captured
from moec.capture.sizes.false_sizes import MOST_ROWS, can_run, false_at
from moec.capture.sizes.guards import Guard, show
from moec.ir.graph import Graph
from moec.ir.size_expressions import size_expressions
from moec.ir.sizes.dims import parse_dim
from moec.oracle.agree import agree_at_sizes, sizes_of


def difference_at_other_sizes(described: Captured, guards: Iterable[Guard]) -> str:
    """A reason against a capture with descriptions: the first sizes, on either side of a guard, at
    which it differs from the module, or a guard that changes beyond all sizes that can be tried.
    "" where there is none."""
    program = described.program
    example = sizes_of(program, described.example)
    tried: dict[tuple[tuple[str, int], ...], None] = {}
    conditions = dict.fromkeys(g.condition for g in guards if g.names <= example.keys())
    for condition in conditions:
        for side in (condition, sympy.Not(condition)):
            sizes = false_at(side, program.graph.bounds, example)
            if not all(map(can_run, sizes)):
                return (
                    f"its code changes at {show(condition)}, beyond {MOST_ROWS} tokens: it "
                    "was not compared there"
                )
            tried |= dict.fromkeys(tuple(sorted(other.items())) for other in sizes)
    for other in tried:
        if agree_at_sizes(program, described.eager, described.example, dict(other)) is False:
            where = ", ".join(f"{name} is {size}" for name, size in other)
            return f"its code computes something different where {where}"
    return ""


def guards_of_graph(graph: Graph) -> tuple[Guard, ...]:
    """The conditions on which sizes in a captured graph and its bounds depend."""
    conditions: dict[sympy.Basic, None] = {}
    for name, limits in graph.bounds.items():
        size = parse_dim(name)
        if limits.low > 1:
            conditions[sympy.Ge(size, limits.low)] = None
        if limits.high is not None:
            conditions[sympy.Le(size, limits.high)] = None
    for expression in dict.fromkeys(e for op in graph.ops for e in size_expressions(op)):
        for part in expression.atoms(*_CHANGING):
            conditions |= dict.fromkeys(_conditions(part))
    return tuple(Guard(condition) for condition in conditions if condition.free_symbols)


_CHANGING = (sympy.Min, sympy.Max, sympy.Mod, sympy.floor, sympy.ceiling)


def _conditions(part: sympy.Expr) -> Iterator[sympy.Basic]:
    """Conditions that change where the choice of a Min or Max, or the first step of a rounding,
    does."""
    if isinstance(part, sympy.Min | sympy.Max):
        yield from (sympy.Ge(a, b) for a, b in itertools.combinations(part.args, 2))
    elif isinstance(part, sympy.Mod):
        yield sympy.Eq(part, 0)
    else:
        yield sympy.Ge(part.args[0], 1)
