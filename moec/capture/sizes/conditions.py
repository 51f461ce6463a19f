"""Conditions on sizes as bounds: of one size, of a product, of a remainder, of an expression."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import sympy

from moec.ir.size_expressions import indicator
from moec.ir.sizes.dims import Bounds, show_dim
from moec.ir.sizes.floats import is_float
from moec.ir.sizes.thresholds import first_true, interval_around, sizes_around, truth_of

_ZERO = Bounds(0, 0)
_LONGEST = 300  # characters of an expression that is checked with each call
_INEQUALITIES = (sympy.Gt, sympy.Ge, sympy.Lt, sympy.Le)


def is_inequality(condition: sympy.Basic) -> bool:
    """Whether a condition is made of inequalities alone."""
    if isinstance(condition, sympy.And | sympy.Or):
        return all(map(is_inequality, condition.args))
    return isinstance(condition, (*_INEQUALITIES, sympy.Ne))


def as_interval(condition: sympy.Basic, example: Mapping[str, int]) -> dict[str, Bounds]:
    """The contiguous range, around the example's size, in which a condition on one size holds;
    empty for a condition on several sizes, or where it holds elsewhere too. That a size is not 1,
    which torch takes for all sizes, is that it is at least 2."""
    truth = truth_of(condition)
    if len(truth.names) != 1:
        return {}
    (size,) = truth.names
    if isinstance(condition, sympy.Ne) and condition.lhs.is_Symbol:
        return {size: Bounds(2)} if condition.rhs == 1 else {}
    near = example[size] if size in example else first_true(truth, size)
    limits = None if near is None else interval_around(truth, size, Bounds(), near)
    return {} if limits is None else {size: limits}


def as_product(condition: sympy.Basic) -> dict[str, Bounds]:
    """The limit that an inequality sets to a product of sizes; empty for another condition."""
    if not isinstance(condition, _INEQUALITIES):
        return {}
    less, more = condition.lts, condition.gts
    limit, side = (more, less) if more.is_Integer else (less, more)
    factor, sizes = side.as_coeff_Mul()
    powers = [part.as_base_exp()[0] for part in sympy.Mul.make_args(sizes)]
    if not limit.is_Integer or not all(base.is_Symbol for base in powers) or not factor > 0:
        return {}
    strict = isinstance(condition, sympy.Gt | sympy.Lt)
    if side is more:
        return {show_dim(sizes): Bounds(max(int(sympy.ceiling((limit + strict) / factor)), 0))}
    high = int(sympy.floor((limit - strict) / factor))
    return {show_dim(sizes): Bounds(0, high)} if high > 0 else {}


def as_multiples(
    condition: sympy.Basic, bounds: Mapping[str, Bounds], example: Mapping[str, int]
) -> dict[str, Bounds]:
    """The remainders that must be 0 where a condition holds, and nowhere else, however it is
    written: 16*S == 64*floor(S/4) gives that of S by 4. Empty for any other condition."""
    names = {symbol.name for symbol in condition.free_symbols}
    if not isinstance(condition, sympy.Eq) or is_float(condition) or not names <= example.keys():
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
