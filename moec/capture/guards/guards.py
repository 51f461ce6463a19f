"""Guards: the conditions on input sizes under which an export is valid.

torch.export traces with the sizes of the example and records each condition on a size that it
evaluated with them: `if n > 8`, `int(n * 2.0 / 8) == 6`. Every guard is handled. It is one of

    implied    by the types of the inputs and the bounds of the sizes: nothing to do
    a bound    an inequality of one size: it limits that size; or one that limits a product of
               sizes to a large number, at least where module and graph differ beyond; or a
               condition without which the module itself fails: that S is a multiple of 4
    harmless   module and graph agree at sizes where it is false, which is tested
    or refused, in the user's names, with the line of code that evaluated it
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import sympy
from torch.export import ExportedProgram
from torch.fx.experimental import symbolic_shapes

from moec.capture.guards.conditions import as_bounds, multiples_in
from moec.capture.guards.false_sizes import can_run, false_at
from moec.capture.user_code.sources import is_internal, is_standard, text_of
from moec.errors import CaptureError, IRError
from moec.ir.dims import Bounds, nearly_from_torch, parse_dim, show_dim, symbols
from moec.ir.graph import Graph
from moec.ir.thresholds import first_true, interval_around, truth_of

Agree = Callable[[Mapping[str, int]], bool | None]
"""Whether module and graph agree at these sizes; None where the module itself fails."""


@dataclass(frozen=True)
class Guard:
    """A condition on named sizes, and the line of the user's code that evaluated it."""

    condition: sympy.Basic
    file: str = ""
    line: int = 0
    function: str = ""

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(symbol.name for symbol in self.condition.free_symbols)

    @property
    def text(self) -> str:
        return text_of(self.file, self.line) if self.file else ""

    def __str__(self) -> str:
        if not self.file:
            return "a guard of the export"
        where = f"{Path(self.file).name}:{self.line} in {self.function}"
        return f"{where}: {self.text}" if self.text else where


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


class _Internal:
    """The set of files that hold no user code, in the form that torch's search for a line takes."""

    def __contains__(self, file: object) -> bool:
        return isinstance(file, str) and (is_internal(file) or is_standard(file))


def located() -> Any:
    """While open, torch records the user's line for a guard, not one of torch's or moec's."""
    return mock.patch.object(symbolic_shapes, "uninteresting_files", _Internal)


def guards_of(exported: ExportedProgram, rename: Mapping[str, str]) -> tuple[Guard, ...]:
    """The guards of an export without duplicates and without guards that its inputs' shapes imply.

    Call it before the export is decomposed, because decomposition adds guards. `rename` maps
    torch's symbols to named sizes. Raises CaptureError for a guard that cannot be converted.
    """
    env = shape_env(exported)
    return () if env is None else guards_in(env, rename)


def guards_in(env: Any, rename: Mapping[str, str]) -> tuple[Guard, ...]:
    """As `guards_of`, of torch's record of the sizes of a trace."""
    guards: dict[sympy.Basic, Guard] = {}
    for guard in env.guards:
        condition = env.replace(guard.expr)
        if condition == sympy.true:
            continue
        location = _place(guard.sloc.framework_loc)
        guards.setdefault(condition, _guard(condition, rename, location))
    return tuple(guards.values())


def _guard(
    condition: sympy.Basic, rename: Mapping[str, str], location: tuple[str, int, str]
) -> Guard:
    try:
        return Guard(_converted(condition, rename), *location)
    except (IRError, AttributeError, TypeError, ValueError) as error:
        where = Guard(condition, *location)
        raise CaptureError(
            f"a condition on sizes cannot be read: {condition} ({error})\n  {where}\n"
            "  fix the sizes that it depends on: dynamic_shapes"
        ) from None


def shape_env(exported: ExportedProgram) -> Any:
    for node in exported.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        mode = getattr(value, "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            return mode.shape_env
    return None


def raw_guards(exported: ExportedProgram) -> list[Guard]:
    """All guards of an export over torch's symbols, including those that its shapes imply."""
    env = shape_env(exported)
    return [] if env is None else [guard_at(guard) for guard in env.guards]


def guard_at(guard: Any) -> Guard:
    """A guard of torch over torch's symbols, with the user's line that evaluated it."""
    return Guard(guard.expr, *_place(guard.sloc.framework_loc))


def _place(location: Any) -> tuple[str, int, str]:
    if not isinstance(location, traceback.FrameSummary) or is_internal(location.filename):
        return "", 0, ""
    return location.filename, location.lineno or 0, location.name


_CONNECTIVES = (sympy.And, sympy.Or, sympy.Not)


def _converted(condition: Any, rename: Mapping[str, str]) -> sympy.Basic:
    """A condition over the named sizes, in the functions of `moec.ir.dims`."""
    if isinstance(condition, _CONNECTIVES):
        return condition.func(*(_converted(a, rename) for a in condition.args))
    if condition in (sympy.true, sympy.false):
        return condition
    if not isinstance(condition, sympy.core.relational.Relational):
        raise IRError("it is no relation")
    left, right = (nearly_from_torch(a, rename) for a in condition.args)
    return condition.func(left, right)


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
    notes: dict[str, None] = {}
    limiting: list[Guard] = []
    remaining: list[Guard] = []
    for guard in guards:
        if not guard.names <= bounds.keys():
            raise GuardRefused(_refusal(name, graph, guard, example), guard)
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
    for guard in remaining:
        false = false_at(guard.condition, bounds, example)
        runs = agree is not None and all(map(can_run, false))
        answers = [agree(sizes) if agree and runs else None for sizes in false]
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


def _narrow(bounds: dict[str, Bounds], limits: Mapping[str, Bounds], guard: Guard) -> None:
    """Add the limits that a guard sets to the bounds."""
    for size, limit in limits.items():
        limit = replace(limit, line=str(guard) if guard.file else "")
        bounds[size] = limit.intersect(bounds.get(size, limit))


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
    if isinstance(guard.condition, sympy.Ne):
        left, right = guard.condition.args
        return Bounds(2) if isinstance(left, sympy.Symbol) and right == 1 else None
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
    """A product of sizes, as text, and the greatest value that a guard allows it. Empty for another
    guard, and for a limit that is so low that proofs and verification may exceed it."""
    if not isinstance(guard.condition, sympy.Gt | sympy.Ge | sympy.Lt | sympy.Le):
        return {}
    factor, sizes = guard.condition.lts.as_coeff_Mul()
    limit = guard.condition.gts
    powers = [part.as_base_exp()[0] for part in sympy.Mul.make_args(sizes)]
    if not limit.is_Integer or not all(base.is_Symbol for base in powers) or not factor > 0:
        return {}
    strict = isinstance(guard.condition, sympy.Gt | sympy.Lt)
    high = int(sympy.floor((limit - strict) / factor))
    return {show_dim(sizes): Bounds(0, high)} if high >= _LEAST_LIMIT else {}


_LEAST_LIMIT = 1 << 12
"""Products of sizes are not limited to less than this."""


def _bakes_in(condition: sympy.Basic) -> bool:
    """Whether the guard says that a number computed of sizes became a constant of the graph. Then
    agreement at a few other sizes proves nothing about the rest."""
    if not isinstance(condition, sympy.Eq):
        return False
    left, right = condition.args
    number, other = (left, right) if left.is_number else (right, left)
    return bool(number.is_number) and not isinstance(other, sympy.Mod)


def show(condition: sympy.Basic) -> str:
    """A condition as a person would write it."""
    if isinstance(condition, sympy.core.relational.Relational):
        left, right = condition.args
        return f"{show_dim(left)} {condition.rel_op} {show_dim(right)}"
    return str(condition)


def _shown(limits: Bounds) -> str:
    if limits.high is None:
        return f"is at least {limits.low}"
    return f"is from {limits.low} to {limits.high}"


def axes(graph: Graph, size: str) -> str:
    """The axes of the inputs that have this size, as text: "axis 1 of x"; at most three."""
    labels = [
        f"axis {axis} of {value.name}"
        for value in graph.inputs
        for axis, dim in enumerate(value.shape)
        if not isinstance(dim, int) and symbols(dim) == {size}
    ]
    return " and ".join(labels[:3])


def _refusal(name: str, graph: Graph, guard: Guard, example: Mapping[str, int]) -> str:
    sizes = sorted(guard.names)
    where = ", ".join(
        f"{size} is {axes(graph, size) or 'a size'}, {example.get(size, '?')} in the example"
        for size in sizes
    )
    return (
        f"{name}: the example's sizes decide what is computed, and other sizes would give wrong "
        f"numbers\n  {guard}\n  the graph holds only where {show(guard.condition)}\n  ({where})\n"
        "  compute it of symbolic sizes (//, min, max, math.ceil) or with torch.where, or give "
        f"dynamic_shapes that fix {' and '.join(sizes)}"
    )
