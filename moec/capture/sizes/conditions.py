"""Guards as bounds of expressions: that S is a multiple of 4 is {Mod(S, 4)} in [0, 0]."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import sympy

from moec.capture.sizes.guards import Guard
from moec.ir.size_expressions import indicator
from moec.ir.sizes.dims import Bounds, show_dim
from moec.ir.sizes.floats import is_float
from moec.ir.sizes.thresholds import first_true, interval_around, sizes_around, truth_of

_ZERO = Bounds(0, 0)
_LONGEST = 300  # characters of an expression that is checked with each call


def multiples_in(
    condition: sympy.Basic, bounds: Mapping[str, Bounds], example: Mapping[str, int]
) -> dict[str, Bounds]:
    """The remainders that must be 0 where a condition holds, and nowhere else, however it is
    written: 16*S == 64*floor(S/4) gives that of S by 4. Empty for any other condition."""
    if not isinstance(condition, sympy.Eq) or is_float(condition):
        return {}
    names = {symbol.name for symbol in condition.free_symbols}
    if not names <= example.keys() or not names <= bounds.keys():
        return {}
    remainders = list(dict.fromkeys(_remainders(condition)))
    truth = truth_of(condition)
    multiple = truth_of(sympy.And(*(sympy.Eq(remainder, 0) for remainder in remainders)))
    if not remainders or not multiple.holds(example):
        return {}
    least = {name: replace(limits, low=max(limits.low, 1)) for name, limits in bounds.items()}
    tried = sizes_around([truth, multiple], least, example)
    if any(truth.holds(sizes) != multiple.holds(sizes) for sizes in tried):
        return {}
    return {show_dim(remainder): _ZERO for remainder in remainders}


def _remainders(condition: sympy.Basic) -> Iterator[sympy.Expr]:
    """The remainders of the sizes that a condition divides by a number."""
    for part in condition.atoms(sympy.Mod):
        if part.args[1].is_Integer and part.free_symbols:
            yield part
    for part in condition.atoms(sympy.floor, sympy.ceiling):
        size, number = part.args[0].as_numer_denom()
        if number.is_Integer and number > 1:
            yield sympy.Mod(size.as_coeff_Add()[1], number)


def as_bounds(condition: sympy.Basic) -> dict[str, Bounds]:
    """The bounds of one expression that hold exactly where a condition does; empty where it is of
    floats, or too long to check with each call."""
    if is_float(condition):
        return {}
    size, limits = indicator(condition), Bounds(1)
    if isinstance(condition, sympy.Eq):
        size, limits = condition.lhs - condition.rhs, _ZERO
    if size is None or not size.free_symbols or len(show_dim(size)) > _LONGEST:
        return {}
    return {show_dim(size): limits}


def domain_bounds(
    guard: Guard, bounds: Mapping[str, Bounds], example: Mapping[str, int]
) -> dict[str, Bounds]:
    """The bounds of sizes, or of an expression of sizes, where arithmetic is defined. Empty where
    no bounds say it."""
    truth = truth_of(guard.condition)
    if len(guard.names) == 1:
        (size,) = guard.names
        near = example[size] if size in example else first_true(truth, size)
        limits = None if near is None else interval_around(truth, size, Bounds(), near)
        return as_bounds(guard.condition) if limits is None else {size: limits}
    at_least_one = {name: Bounds(1).intersect(bounds[name]) for name in guard.names}
    tried = sizes_around([truth], {**bounds, **at_least_one}, example)
    if not all(map(truth.holds, tried)):
        return as_bounds(guard.condition)
    zeros = (name for name in sorted(guard.names) if not truth.holds({**example, name: 0}))
    return dict.fromkeys(zeros, Bounds(1))
