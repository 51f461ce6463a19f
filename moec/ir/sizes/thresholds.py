"""The sizes at which a size expression or a condition changes, so that both sides can be tried."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy

from moec.ir.sizes.dims import Bounds, parse_dim, symbol
from moec.ir.sizes.exact import Function, function_of
from moec.ir.sizes.floats import is_float

_DENSE = 512
"""The number of sizes, from the least one, that are tried one by one."""
_FAR = tuple(2**n + d for n in range(10, 31) for d in (-1, 0, 1, 37))
_COMBINATIONS = 4096
_LONGEST_STEP = 4096
"""From a size to the next one that bounds of expressions allow."""


@dataclass(frozen=True)
class Truth:
    """A condition on, or an expression of, named sizes as a function."""

    names: frozenset[str]
    expression: sympy.Basic

    def value(self, sizes: Mapping[str, int]) -> Any:
        """Raises ZeroDivisionError as the expression does."""
        return function_of(self.expression)(sizes)

    def holds(self, sizes: Mapping[str, int]) -> bool:
        try:
            return bool(self.value(sizes))
        except ZeroDivisionError:
            return False


def truth_of(expression: sympy.Basic) -> Truth:
    return Truth(frozenset(s.name for s in expression.free_symbols), expression)


def allows(bounds: Mapping[str, Bounds], sizes: Mapping[str, int]) -> bool:
    """Whether sizes are within the bounds of names, and of expressions of names."""
    return violated(bounds, sizes) is None


def violated(bounds: Mapping[str, Bounds], sizes: Mapping[str, int]) -> str | None:
    """The first name or expression that is outside of its bounds."""
    for name, limits in bounds.items():
        truth = _bounded(name)
        if truth.names <= sizes.keys() and not _is_inside(truth, limits, sizes):
            return name
    return None


def _is_inside(truth: Truth, limits: Bounds, sizes: Mapping[str, int]) -> bool:
    try:
        return limits.contains(truth.value(sizes))
    except ZeroDivisionError:
        return False


@lru_cache(maxsize=1 << 12)
def _bounded(name: str) -> Truth:
    return truth_of(symbol(name) if name.isidentifier() else sympy.sympify(parse_dim(name)))


def nearest_allowed(
    bounds: Mapping[str, Bounds], sizes: Mapping[str, int], direction: int = 1
) -> dict[str, int]:
    """`sizes`, changed in a direction (1 or -1) as little as the bounds of expressions need: 7 to
    8, or to 4, where it must be a multiple of 4. Sizes for which no allowed ones are near stay."""
    moved = dict(sizes)
    expressions = {name: limits for name, limits in bounds.items() if not name.isidentifier()}
    for name, size in sizes.items():
        limits = {e: b for e, b in expressions.items() if name in _bounded(e).names}
        if not limits or allows(limits, moved):
            continue
        for other in range(size, size + direction * _LONGEST_STEP, direction):
            inside = other >= 1 and bounds.get(name, Bounds()).contains(other)
            if inside and allows(limits, {**moved, name: other}):
                moved[name] = other
                break
    return moved


def candidates(limits: Bounds, near: int, numbers: Iterable[int] = ()) -> list[int]:
    """Sizes within `limits`: the least ones, some around `near` and `numbers`, and large ones."""
    high = limits.high if limits.high is not None else 2**31
    sizes = {*range(limits.low, limits.low + _DENSE), *_FAR, near, high}
    sizes |= {n + d for n in (near, *numbers) for d in (-1, 0, 1)}
    return sorted(n for n in sizes if limits.low <= n <= high)


def constants(expression: sympy.Basic) -> set[int]:
    """The integers in an expression: most thresholds are one of them, or a quotient of two."""
    numbers = {int(n) for n in expression.atoms(sympy.Integer) if 0 < n < 2**31}
    numbers |= {int(r.q) for r in expression.atoms(sympy.Rational) if r.q < 2**12}
    products = {a * b for a, b in itertools.combinations(sorted(numbers)[:12], 2)}
    return numbers | {n for n in products if n < 2**31}


def first_true(truth: Truth, size: str) -> int | None:
    """The least candidate size for which a condition on it holds."""
    tried = candidates(Bounds(), 0, constants(truth.expression))
    return next((n for n in tried if truth.holds({size: n})), None)


def interval_around(truth: Truth, size: str, limits: Bounds, example: int) -> Bounds | None:
    """The interval around the example's size within which a condition on it holds. None if it does
    not hold at the example, or holds on more than one interval."""
    if not truth.holds({size: example}):
        return None
    tried = candidates(limits, example, constants(truth.expression))
    false = [n for n in tried if not truth.holds({size: n})]
    below = max((n for n in false if n < example), default=None)
    above = min((n for n in false if n > example), default=None)
    low = limits.low if below is None else _last_true(truth, size, example, below)
    high = limits.high if above is None else _last_true(truth, size, example, above)
    inside = [n for n in tried if n >= low and (high is None or n <= high)]
    again = [n for n in tried if n not in inside and truth.holds({size: n})]
    return None if again else Bounds(low, high)


def _last_true(truth: Truth, size: str, true: int, false: int) -> int:
    """The last size towards `false` at which a condition holds."""
    while abs(false - true) > 1:
        middle = (true + false) // 2
        true, false = (middle, false) if truth.holds({size: middle}) else (true, middle)
    return true


def sizes_around(
    truths: Sequence[Truth], bounds: Mapping[str, Bounds], example: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """Assignments of all sizes, the least product first. A size that no truth contains is as small
    as the example allows."""
    names = sorted(frozenset().union(*(t.names for t in truths)))
    numbers = set().union(*(constants(t.expression) for t in truths))
    few = max(2, round(_COMBINATIONS ** (1 / max(len(names), 1))))
    near = {n: example.get(n, bounds[n].low) for n in names}
    choices = [_nearest_few(candidates(bounds[n], near[n], numbers), few, near[n]) for n in names]
    combinations = sorted(itertools.product(*choices), key=lambda c: math.prod(n + 1 for n in c))
    rest = {n: example[n] for n in example if n not in names}
    for combination in combinations:
        yield rest | dict(zip(names, combination, strict=True))


def far_sizes(
    truth: Truth, bounds: Mapping[str, Bounds], example: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """Assignments in which one size varies up to the end of its bounds and the others are those of
    the example, or the least ones: large sizes, and both sides of each point at which a relation of
    the condition changes. They are evaluated only, however many rows they are."""
    relations = truth.expression.atoms(sympy.core.relational.Relational)
    numbers = constants(truth.expression)
    names = truth.names & example.keys()
    for name in sorted(names):
        for other in ({}, {n: max(bounds[n].low, 1) for n in names - {name}}):
            rest = {**example, **other}
            rows = math.prod(rest[n] for n in names - {name})
            quotients = {number // rows for number in numbers if number >= rows}
            tried = _far_candidates(bounds[name], {*numbers, *quotients})
            for relation in relations:
                differences = Truth(truth.names, relation.lhs - relation.rhs)
                tried |= set(_sign_changes(differences, name, rest, sorted(tried)))
            yield from ({**rest, name: size} for size in sorted(tried))


def _far_candidates(limits: Bounds, numbers: Iterable[int]) -> set[int]:
    high = limits.high if limits.high is not None else 2**31
    sizes = {*_FAR, max(limits.low, 1), high} | {n + d for n in numbers for d in (-1, 0, 1)}
    return {n for n in sizes if max(limits.low, 1) <= n <= high}


def _sign_changes(
    difference: Truth, name: str, rest: Mapping[str, int], tried: Sequence[int]
) -> Iterator[int]:
    """Sizes on both sides of a change of sign between two of `tried`, which are ascending."""

    def sign(size: int) -> int | None:
        try:
            value = difference.value({**rest, name: size})
        except ZeroDivisionError:
            return None
        return int(value > 0) - int(value < 0)

    signs = [sign(size) for size in tried]
    for low, high, before, after in zip(tried, tried[1:], signs, signs[1:], strict=False):
        if before == after:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sign(middle) == before else (low, middle)
        yield low
        yield high


def _nearest_few(values: Sequence[int], count: int, near: int) -> list[int]:
    """`count` of the values: the least ones and some around `near`."""
    if len(values) <= count:
        return list(values)
    nearest_ones = sorted(values, key=lambda n: abs(n - near))[: count // 2]
    return sorted({*values[: count - count // 2], *nearest_ones})


_ROUNDS = ("floor", "ceiling", "rint", "Mod")
_CHOOSES = ("Max", "Min")
_LOOKED_AT = 1 << 12
"""Thresholds are searched for among sizes up to this one."""


def sizes_at_changes(
    expressions: Iterable[sympy.Basic], bounds: Mapping[str, Bounds], example: Mapping[str, int]
) -> list[dict[str, int]]:
    """Sizes on both sides of the first points at which a part of an expression changes: the choice
    of Max and Min, the result of a rounding, and a double that rounds to an integer.

    One size varies at a time, the others are the example's.
    """
    parts: dict[sympy.Basic, None] = {}
    for expression in expressions:
        for part in sympy.preorder_traversal(expression):
            if type(part).__name__ in (*_ROUNDS, *_CHOOSES) and part.free_symbols:
                parts[part] = None
    result: dict[tuple[str, int], None] = {}
    for part in parts:
        names = {s.name for s in part.free_symbols}
        for name in sorted(names & bounds.keys()) if names <= example.keys() else ():
            for size in _change_sizes(part, name, bounds[name], example):
                result[name, size] = None
    return [{**example, name: size} for name, size in result]


def _change_sizes(
    part: sympy.Basic, name: str, limits: Bounds, example: Mapping[str, int]
) -> Iterator[int]:
    """The sizes before and after the first change, and at the last one within the search."""
    high = _LOOKED_AT if limits.high is None else min(limits.high, _LOOKED_AT)
    state = _state_of(part)
    before: Any = None
    last: int | None = None
    for size in range(max(limits.low, 1), high + 1):
        try:
            now = state({**example, name: size})
        except ZeroDivisionError:
            continue
        if before is not None and now != before:
            if last is None:
                yield size - 1
                yield size
            last = size
            if type(part).__name__ in _CHOOSES:
                return
        before = now
        if last is not None and size > 4 * _DENSE:
            break
    yield from _onto_whole_numbers(part, name, limits, example, high)


def _state_of(part: sympy.Basic) -> Function:
    """A function whose value changes where the part changes."""
    arguments = [function_of(a) for a in part.args]
    match type(part).__name__:
        case "Max":
            return lambda sizes: _position_of_best(max, [a(sizes) for a in arguments])
        case "Min":
            return lambda sizes: _position_of_best(min, [a(sizes) for a in arguments])
        case "Mod":
            top, below = arguments
            return lambda sizes: top(sizes) // below(sizes)
    return function_of(part)


def _position_of_best(best: Callable[..., Any], values: Sequence[Any]) -> int:
    return values.index(best(values))


def _onto_whole_numbers(
    part: sympy.Basic, name: str, limits: Bounds, example: Mapping[str, int], high: int
) -> Iterator[int]:
    """The first sizes at which doubles give an integer, or very nearly one."""
    inner = part.args[0]
    if not is_float(inner):
        return
    value, count = function_of(inner), 0
    for size in range(max(limits.low, 1), high + 1):
        number = value({**example, name: size})
        if number and abs(number - round(number)) < Fraction(1, 10**9):
            yield size
            count += 1
            if count == 3:
                return
