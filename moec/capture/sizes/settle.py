"""Settles guards: each is implied, a bound, harmless, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch

from moec.capture.sizes.conditions import as_bounds, domain_bounds, multiples_in
from moec.capture.sizes.false_sizes import can_run, false_at
from moec.capture.sizes.guards import Guard, axes, show
from moec.errors import CaptureError
from moec.ir.graph import Graph, Program
from moec.ir.sizes.dims import Bounds, parse_dim, show_dim
from moec.ir.sizes.thresholds import first_true, interval_around, truth_of
from moec.oracle.agree import agree_at_sizes, sizes_of
from moec.oracle.cases import Eager

Agree = Callable[[Mapping[str, int]], bool | None]
"""Whether module and graph agree at these sizes; None where the module itself fails."""


@dataclass(frozen=True)
class Settled:
    """The bounds of the sizes, notes about them for the report, and the guards that limit them."""

    bounds: Mapping[str, Bounds]
    notes: tuple[str, ...] = ()
    limiting: tuple[Guard, ...] = ()


class GuardRefused(CaptureError):
    """A guard that is neither implied, nor a bound, nor harmless."""

    def __init__(self, message: str, guard: Guard) -> None:
        super().__init__(message)
        self.guard = guard


def settle(
    name: str,
    graph: Graph,
    guards: Sequence[Guard],
    example: Mapping[str, int],
    agree: Agree | None,
) -> Settled:
    """The bounds of `graph` under its guards, and notes about them. `example` holds the sizes of
    the export's example. `agree` compares graph and module at other sizes; None means that the
    source is an exported program, which is valid only where its guards hold.

    Raises GuardRefused for a guard that is neither implied, nor a bound, nor harmless.
    """
    bounds = dict(graph.bounds)
    agree = _remembered(agree) if agree else None
    notes: dict[str, None] = {}
    limiting: list[Guard] = []
    remaining: list[Guard] = []
    for guard in guards:
        if not guard.names <= bounds.keys():
            raise GuardRefused(_refusal(name, graph, guard, example), guard)
        if guard.is_domain:
            notes |= dict.fromkeys(_narrow_to_domain(bounds, guard, example, agree))
            continue
        limits = _limits(guard, example)
        if limits is None:
            remaining.append(guard)
            continue
        (size,) = guard.names
        if agree and limits.low == 2 and agree({**example, size: 1}):
            limits = replace(limits, low=0)  # `if n > 1`, and the result is the same at 1
        bounds[size] = bounds[size].intersect(limits)
        if limits.low > 1 or limits.high is not None:
            limiting.append(guard)
            notes[f"{size} {_shown(bounds[size])}: {guard}"] = None
    for guard in _by_own_difference(remaining, bounds, example, agree):
        false, answers = _tried(guard, bounds, example, agree)
        runs = agree is not None and all(map(can_run, false))
        tried = [answer for answer in answers if answer is not None]
        same = bool(tried) and all(tried) and not _bakes_in(guard.condition)
        may_fail = agree is None or (runs and _fails_last(false, answers))
        multiples = multiples_in(guard.condition, bounds, example) if false and may_fail else {}
        if multiples:
            _narrow(bounds, multiples, guard)
            notes[f"{' and '.join(map(_multiple, multiples))}: {guard}"] = None
        elif same:
            where = "at other sizes"
            if isinstance(guard.condition, sympy.core.relational.Relational):
                where = f"where not {show(guard.condition)}"
            notes[f"the same {where}, as was tried: {guard}"] = None
        elif false:
            fails = runs and not tried  # the module itself, where the guard does not hold
            required = {} if tried or (agree and not runs) else _edges(guard, example)
            required = required or _product_limit(guard)
            if required:
                _narrow(bounds, required, guard)
                limits_text = "; ".join(f"{size} {_shown(bounds[size])}" for size in required)
                notes[f"{limits_text}: {guard}"] = None
                limiting += [] if fails else [guard]
            elif fails:
                _narrow(bounds, as_bounds(guard.condition), guard)
                notes[f"the model itself fails where not {show(guard.condition)}: {guard}"] = None
            else:
                raise GuardRefused(_refusal(name, graph, guard, example), guard)
    return Settled(bounds, tuple(notes), tuple(limiting))


def settled(
    name: str,
    program: Program,
    guards: Sequence[Guard],
    eager: Eager,
    example: Sequence[torch.Tensor],
) -> Settled:
    """The bounds of the sizes under the program's guards, and notes about them.

    Raises GuardRefused for a guard at whose violation graph and module differ.
    """

    def agree(other: Mapping[str, int]) -> bool | None:
        return agree_at_sizes(program, eager, example, other)

    return settle(name, program.graph, guards, sizes_of(program, example), agree)


def bounded(program: Program, settlement: Settled) -> Program:
    """The program with the bounds that its guards set."""
    return replace(program, graph=replace(program.graph, bounds=settlement.bounds))


def required(
    name: str, program: Program, guards: Sequence[Guard], example: Sequence[torch.Tensor]
) -> tuple[Program, tuple[str, ...]]:
    """As `settled`, for an exported program, which is valid only where its guards hold."""
    result = settle(name, program.graph, guards, sizes_of(program, example), None)
    return bounded(program, result), result.notes


def _remembered(agree: Agree) -> Agree:
    answers: dict[frozenset[tuple[str, int]], bool | None] = {}

    def answer(sizes: Mapping[str, int]) -> bool | None:
        key = frozenset(sizes.items())
        if key not in answers:
            answers[key] = agree(sizes)
        return answers[key]

    return answer


def _tried(
    guard: Guard, bounds: Mapping[str, Bounds], example: Mapping[str, int], agree: Agree | None
) -> tuple[list[Mapping[str, int]], list[bool | None]]:
    """Sizes at which a guard is false, and whether module and graph agree at each; None for all
    where they are too many rows to run."""
    false = false_at(guard.condition, bounds, example)
    if agree is None or not all(map(can_run, false)):
        return false, [None] * len(false)
    return false, [agree(sizes) for sizes in false]


def _by_own_difference(
    guards: Sequence[Guard],
    bounds: Mapping[str, Bounds],
    example: Mapping[str, int],
    agree: Agree | None,
) -> list[Guard]:
    """The guards, last those for whose differences another may be the cause: torch compares 20*S
    with 20, and at S = 1 there are also fewer than 10 rows, for which a capacity has another
    branch. Once that is a bound, they are tried within it."""

    def may_be_another(guard: Guard) -> bool:
        false, answers = _tried(guard, bounds, example, agree)
        different = [sizes for sizes, equal in zip(false, answers, strict=True) if equal is False]
        others = [truth_of(other.condition) for other in guards if other is not guard]
        return bool(different) and all(
            any(not other.holds(sizes) for other in others) for sizes in different
        )

    return sorted(guards, key=may_be_another) if len(guards) > 1 else list(guards)


def _narrow(bounds: dict[str, Bounds], limits: Mapping[str, Bounds], guard: Guard) -> None:
    """Add the limits that a guard sets to the bounds."""
    for size, limit in limits.items():
        limit = replace(limit, line=str(guard) if guard.file else "")
        bounds[size] = limit.intersect(bounds.get(size, limit))


def _narrow_to_domain(
    bounds: dict[str, Bounds], guard: Guard, example: Mapping[str, int], agree: Agree | None
) -> list[str]:
    """Limit the bounds to where arithmetic is defined, and say so. The size 0 stays where module
    and graph agree: torch takes it that the size in `x / max(size, 1)` is never 0."""
    limits = domain_bounds(guard, bounds, example)
    at_zero = [name for name, limit in limits.items() if limit == Bounds(1) and name in example]
    for name in at_zero:
        if agree and agree({**example, name: 0}):
            del limits[name]
    _narrow(bounds, limits, guard)
    lowest = {name: limit for name, limit in limits.items() if name not in at_zero}
    return [f"{name} {_shown(limit)}: {guard}" for name, limit in lowest.items()]


def _fails_last(tried: Sequence[Mapping[str, int]], answers: Sequence[bool | None]) -> bool:
    """Whether the module fails at the most rows of those that were tried: at the least, it may run
    where an axis of 1 is that of another tensor, or fail for having too few rows."""
    rows = [math.prod(sizes.values()) for sizes in tried]
    return bool(answers) and answers[rows.index(max(rows))] is None


def _multiple(remainder: str) -> str:
    size, number = sympy.sympify(parse_dim(remainder)).args
    return f"{size} is a multiple of {number}"


_INEQUALITIES = (sympy.Gt, sympy.Ge, sympy.Lt, sympy.Le, sympy.Ne)


def _limits(guard: Guard, example: Mapping[str, int]) -> Bounds | None:
    """The range of sizes for which an inequality of one size holds; None for any other guard, and
    where these sizes are no contiguous range."""
    if not isinstance(guard.condition, _INEQUALITIES) and not _joins(guard.condition):
        return None
    if isinstance(guard.condition, sympy.Ne) and guard.condition.lhs.is_Symbol:
        return Bounds(2) if guard.condition.rhs == 1 else None
    return next(iter(_edges(guard, example).values()), None)


def _joins(condition: sympy.Basic) -> bool:
    """Whether a condition is made of inequalities alone."""
    return isinstance(condition, sympy.And | sympy.Or) and all(
        isinstance(part, _INEQUALITIES) or _joins(part) for part in condition.args
    )


def _edges(guard: Guard, example: Mapping[str, int]) -> Mapping[str, Bounds]:
    """The contiguous range, around the example's size, in which a guard on one size holds; empty
    for a guard on several sizes, or where it holds elsewhere too."""
    if len(guard.names) != 1:
        return {}
    (size,) = guard.names
    truth = truth_of(guard.condition)
    near = example[size] if size in example else first_true(truth, size)
    limits = None if near is None else interval_around(truth, size, Bounds(), near)
    return {} if limits is None else {size: limits}


def _product_limit(guard: Guard) -> dict[str, Bounds]:
    """A product of sizes, as text, and the values that a guard allows it. Empty for another guard,
    and for a greatest value that is so low that proofs and verification may exceed it."""
    if not isinstance(guard.condition, sympy.Gt | sympy.Ge | sympy.Lt | sympy.Le):
        return {}
    less, more = guard.condition.lts, guard.condition.gts
    limit, side = (more, less) if more.is_Integer else (less, more)
    factor, sizes = side.as_coeff_Mul()
    powers = [part.as_base_exp()[0] for part in sympy.Mul.make_args(sizes)]
    if not limit.is_Integer or not all(base.is_Symbol for base in powers) or not factor > 0:
        return {}
    strict = isinstance(guard.condition, sympy.Gt | sympy.Lt)
    if side is more:
        return {show_dim(sizes): Bounds(max(int(sympy.ceiling((limit + strict) / factor)), 0))}
    high = int(sympy.floor((limit - strict) / factor))
    return {show_dim(sizes): Bounds(0, high)} if high >= _LEAST_LIMIT else {}


_LEAST_LIMIT = 1 << 12
"""No greatest value of a product of sizes is less than this."""


def _bakes_in(condition: sympy.Basic) -> bool:
    """Whether the guard says that a number computed of sizes became a constant of the graph, or of
    one of the sides of which it was merged. Then agreement at a few other sizes proves nothing
    about the rest."""
    return any(map(_is_number, condition.atoms(sympy.Eq)))


def _is_number(condition: sympy.Eq) -> bool:
    left, right = condition.args
    number, other = (left, right) if left.is_number else (right, left)
    return bool(number.is_number) and not isinstance(other, sympy.Mod)


def _shown(limits: Bounds) -> str:
    if limits.high is None:
        return f"is at least {limits.low}"
    return f"is from {limits.low} to {limits.high}"


def _refusal(name: str, graph: Graph, guard: Guard, example: Mapping[str, int]) -> str:
    sizes = sorted(guard.names)
    where = ", ".join(
        f"{size} is {axes(graph, size) or 'a size'}"
        + (f", {example[size]} in the example" if size in example else "")
        for size in sizes
    )
    return (
        f"{name}: the example's sizes decide what is computed, and other sizes would give wrong "
        f"numbers\n  {guard}\n  the graph holds only where {show(guard.condition)}\n  ({where})\n"
        "  compute it of symbolic sizes (//, min, max, math.ceil) or with torch.where, or give "
        f"dynamic_shapes that fix {' and '.join(sizes)}"
    )
