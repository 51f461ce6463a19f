"""Settles guards by comparing a captured program with its module at other sizes.

torch.export traces with the sizes of the example and records each condition on a size that it
evaluated with them: `if n > 8`, `int(n * 2.0 / 8) == 6`, and moec those under which Python's
arithmetic is defined. Every guard is handled. It is one of

    implied    by the types of the inputs and the bounds of the sizes: nothing to do
    a bound    an inequality of one size: it limits that size; or one that limits a product of
               sizes to a large number, at least where module and graph differ beyond; or a
               condition without which the module itself fails: that S is a multiple of 4
    harmless   module and graph agree at sizes where it is false, which is tested
    or refused, in the user's names, with the line of code that evaluated it

What happens at sizes of 0, and of 1 alone, is tested later (`least_sizes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch

from moec.capture.sizes.false_sizes import can_run, false_at, with_many_rows
from moec.capture.sizes.guards import Guard, axes, show
from moec.errors import CaptureError
from moec.ir.graph import Graph, Program
from moec.ir.replace_sizes import indicator
from moec.ir.sizes.dims import Bounds, parse_dim, show_dim
from moec.ir.sizes.floats import is_float
from moec.ir.sizes.thresholds import first_true, interval_around, sizes_around, truth_of
from moec.oracle.agree import agree_at_sizes, sizes_of
from moec.oracle.cases import Eager

Sizes = Mapping[str, int]
Agree = Callable[[Sizes], bool | None]
"""Whether module and graph agree at these sizes; None where the module itself fails."""


@dataclass(frozen=True)
class Settled:
    """The bounds of the sizes, notes about them for the report, and the guards that limit them."""

    bounds: Mapping[str, Bounds]
    notes: tuple[str, ...] = ()
    limiting: tuple[Guard, ...] = ()

    def bounded(self, program: Program) -> Program:
        """The program with these bounds."""
        return replace(program, graph=replace(program.graph, bounds=self.bounds))


class GuardRefused(CaptureError):
    """A guard that is neither implied, nor a bound, nor harmless."""

    def __init__(self, name: str, graph: Graph, guard: Guard, example: Sizes) -> None:
        sizes = sorted(guard.names)
        where = ", ".join(
            f"{size} is {axes(graph, size) or 'a size'}"
            + (f", {example[size]} in the example" if size in example else "")
            for size in sizes
        )
        super().__init__(
            f"{name}: the example's sizes decide what is computed, and other sizes would give "
            f"wrong numbers\n  {guard}\n  the graph holds only where {show(guard.condition)}\n"
            f"  ({where})\n"
            "  compute it of symbolic sizes (//, min, max, math.ceil) or with torch.where, or give "
            f"dynamic_shapes that fix {' and '.join(sizes)}"
        )
        self.guard = guard


def settled(
    name: str,
    program: Program,
    guards: Sequence[Guard],
    eager: Eager | None,
    example: Sequence[torch.Tensor],
    unjoined: Collection[sympy.Basic] = (),
) -> Settled:
    """`settle` for a program. `eager` is None for an exported program of the user's."""
    if eager is None:
        return settle(name, program.graph, guards, sizes_of(program, example), None)
    run = eager

    def agree(sizes: Sizes) -> bool | None:
        return agree_at_sizes(program, run, example, sizes)

    return settle(name, program.graph, guards, sizes_of(program, example), agree, unjoined)


def settle(
    name: str,
    graph: Graph,
    guards: Sequence[Guard],
    example: Sizes,
    agree: Agree | None,
    unjoined: Collection[sympy.Basic] = (),
) -> Settled:
    """The bounds of `graph` under its guards, and notes about them. `example` holds the sizes of
    the export's example. `agree` compares graph and module at other sizes; None means that the
    source is an exported program, which is valid only where its guards hold. An inequality of one
    size is a bound without comparison, for the other side of the branch may be joined to this one;
    those in `unjoined` are compared there, since that failed.

    Raises GuardRefused for a guard that is neither implied, nor a bound, nor harmless.
    """
    bounds = dict(graph.bounds)
    agree = _remembered(agree) if agree else None
    notes: dict[str, None] = {}
    limiting: list[Guard] = []
    others: list[Guard] = []

    def limit(limits: Mapping[str, Bounds], guard: Guard, words: str = "") -> None:
        for size, each in limits.items():
            each = replace(each, line=str(guard) if guard.file else "")
            bounds[size] = each.intersect(bounds.get(size, each))
        shown = "; ".join(f"{size} {_shown(bounds[size])}" for size in limits)
        notes[f"{words or shown}: {guard}"] = None

    for guard in guards:
        if not guard.names <= bounds.keys():
            raise GuardRefused(name, graph, guard, example)
        interval = as_interval(guard.condition, example) if is_inequality(guard.condition) else {}
        if not interval:
            others.append(guard)
            continue
        ((size, limits),) = interval.items()
        if (
            agree
            and limits.low
            and (limits.low == 1 or (limits.low == 2 and agree({**example, size: 1})))
        ):
            limits = replace(limits, low=0)  # `if n > 1`, and the result is the same at 1
        if limits.low < 2 and limits.high is None:
            bounds[size] = bounds[size].intersect(limits)
        elif guard.condition in unjoined and agree and _same_beyond(guard, bounds, example, agree):
            notes[_harmless(guard)] = None
        else:
            limit({size: limits}, guard)
            limiting.append(guard)
    for guard in _by_own_difference(others, bounds, example, agree):
        false = false_at(guard.condition, bounds, example)
        if not false:
            continue
        answers = _answers(false, agree)
        equal = [answer for answer in answers if answer is not None]
        fails = bool(answers) and not equal  # the module itself, where the guard does not hold
        interval = as_interval(guard.condition, example) if agree is None or fails else {}
        limits_of_size = interval or as_product(guard.condition)
        multiples: Mapping[str, Bounds] = {}
        if agree is None or _fails_last(false, answers):
            multiples = as_multiples(guard.condition, bounds, example)
        if multiples:
            limit(multiples, guard, " and ".join(map(_multiple, multiples)))
        elif equal and all(equal) and not _bakes_in(guard.condition):
            notes[_harmless(guard)] = None
        elif limits_of_size:
            limit(limits_of_size, guard)
            limiting += [] if fails else [guard]
        elif fails:
            words = f"the model itself fails where not {show(guard.condition)}"
            limit(as_bounds(guard.condition), guard, words)
        else:
            raise GuardRefused(name, graph, guard, example)
    return Settled(bounds, tuple(notes), tuple(limiting))


def _remembered(agree: Agree) -> Agree:
    answers: dict[frozenset[tuple[str, int]], bool | None] = {}

    def answer(sizes: Sizes) -> bool | None:
        key = frozenset(sizes.items())
        if key not in answers:
            answers[key] = agree(sizes)
        return answers[key]

    return answer


def _answers(false: Sequence[Sizes], agree: Agree | None) -> list[bool | None]:
    """Whether module and graph agree at each of these sizes; empty where they are too many rows."""
    return [agree(sizes) for sizes in false] if agree and all(map(can_run, false)) else []


def _same_beyond(guard: Guard, bounds: Mapping[str, Bounds], example: Sizes, agree: Agree) -> bool:
    """Whether module and graph agree wherever a guard is false, also at many rows."""
    false = false_at(guard.condition, bounds, example)
    false += with_many_rows(guard.condition, bounds, false)
    return all(can_run(sizes) and agree(sizes) for sizes in false)


def _by_own_difference(
    guards: Sequence[Guard], bounds: Mapping[str, Bounds], example: Sizes, agree: Agree | None
) -> list[Guard]:
    """The guards, those last that are false together with another wherever they make a difference:
    torch compares 20*S with 20, and at S = 1 there are also fewer than 10 rows, for which a
    capacity has another branch. Once that is a bound, they are compared within it."""

    def may_be_another(guard: Guard) -> bool:
        false = false_at(guard.condition, bounds, example)
        answers = zip(false, _answers(false, agree), strict=False)
        different = [sizes for sizes, equal in answers if equal is False]
        others = [truth_of(other.condition) for other in guards if other is not guard]
        return bool(different) and all(
            any(not other.holds(sizes) for other in others) for sizes in different
        )

    return sorted(guards, key=may_be_another) if len(guards) > 1 else list(guards)


def _fails_last(tried: Sequence[Sizes], answers: Sequence[bool | None]) -> bool:
    """Whether the module fails at the most rows of those that were tried: at the least, it may run
    where an axis of 1 is that of another tensor, or fail for having too few rows."""
    rows = [math.prod(sizes.values()) for sizes in tried]
    return bool(answers) and answers[rows.index(max(rows))] is None


def _bakes_in(condition: sympy.Basic) -> bool:
    """Whether the guard says that a number computed of sizes became a constant of the graph, or of
    one of the sides of which it was merged. Then agreement at a few other sizes proves nothing
    about the rest."""
    for equality in condition.atoms(sympy.Eq):
        left, right = equality.args
        number, other = (left, right) if left.is_number else (right, left)
        if number.is_number and not isinstance(other, sympy.Mod):
            return True
    return False


def _harmless(guard: Guard) -> str:
    where = "at other sizes"
    if isinstance(guard.condition, sympy.core.relational.Relational):
        where = f"where not {show(guard.condition)}"
    return f"the same {where}, as was tried: {guard}"


def _multiple(remainder: str) -> str:
    size, number = sympy.sympify(parse_dim(remainder)).args
    return f"{size} is a multiple of {number}"


def _shown(limits: Bounds) -> str:
    if limits.high is None:
        return f"is at least {limits.low}"
    return f"is from {limits.low} to {limits.high}"


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
    """The limit that an inequality sets to a product of sizes; empty for another condition. That
    the product is not 1 is that it is at least 2."""
    if isinstance(condition, sympy.Ne) and condition.rhs == condition.lhs.as_coeff_Mul()[0]:
        condition = sympy.Ge(condition.lhs, 2 * condition.rhs)
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
