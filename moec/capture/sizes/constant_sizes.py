"""Parts of sizes that have one value within the bounds become numbers.

    S1 in 16..19:   f32[B, 32*floor(S1/4)]   ->   f32[B, 128]

A model with images may run only where its images have one number of patches. Rows of that length
meet weights, and kernels need it as a number.
"""

from __future__ import annotations

import sympy

from moec.errors import IRError
from moec.ir.graph import Program
from moec.ir.replace_sizes import replace_sizes
from moec.ir.sizes.dims import Dim, canonical
from moec.ir.sizes.thresholds import truth_of

_FEW = 64
"""A size with more values than that is not tried at each of them."""
_STEPS = (sympy.floor, sympy.ceiling, sympy.Mod, sympy.Max, sympy.Min)


def fold_constant_sizes(program: Program) -> Program:
    """The program with numbers for roundings, remainders, maxima and minima of one size that have
    one value within its bounds."""
    values = {
        name: range(bounds.low, bounds.high + 1)
        for name, bounds in program.graph.bounds.items()
        if bounds.high is not None and bounds.high - bounds.low < _FEW
    }
    if not values:
        return program
    numbers: dict[sympy.Expr, int | None] = {}

    def fold(size: sympy.Expr) -> Dim:
        for part in size.atoms(*_STEPS) - numbers.keys():
            numbers[part] = _number(part, values)
        rule = {part: n for part in size.atoms(*_STEPS) if (n := numbers[part]) is not None}
        return canonical(sympy.expand(size.xreplace(rule))) if rule else size

    return Program(replace_sizes(program.graph, fold), program.weights)


def _number(part: sympy.Expr, values: dict[str, range]) -> int | None:
    """The value of an expression of one size, if it is the same number at all `values`."""
    truth = truth_of(part)
    if len(truth.names) != 1 or not truth.names <= values.keys():
        return None
    (name,) = truth.names
    try:
        results = {truth.value({name: size}) for size in values[name]}
    except (ZeroDivisionError, IRError):  # a division by this size, or a function of torch's
        return None
    (first, *others) = results
    return int(first) if not others and first == int(first) else None
