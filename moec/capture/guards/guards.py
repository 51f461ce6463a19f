"""Guards: the conditions on input sizes under which an export is valid.

torch.export traces with the sizes of the example and records each condition on a size that it
evaluated with them: `if n > 8`, `int(n * 2.0 / 8) == 6`. Every guard is handled. It is one of

    implied    by the types of the inputs and the bounds of the sizes: nothing to do
    a bound    an inequality of one size: it limits that size
    harmless   module and graph agree at sizes where it is false, which is tested
    or refused, in the user's names, with the line of code that evaluated it
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import sympy
from torch.export import ExportedProgram
from torch.fx.experimental import symbolic_shapes

from moec.capture.user_code.sources import is_internal, text_of
from moec.errors import CaptureError, IRError
from moec.ir.dims import Bounds, nearly_from_torch, show_dim, symbols
from moec.ir.graph import Graph
from moec.ir.thresholds import far_sizes, first_true, interval_around, sizes_around, truth_of

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
        return isinstance(file, str) and is_internal(file)


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
        bounds[size] = _intersection(bounds[size], limits)
        if limits.low > 1 or limits.high is not None:
            limiting.append(guard)
            notes[f"{size} {_shown(bounds[size])}: {guard}"] = None
    for guard in remaining:
        false = false_at(guard, bounds, example)
        answers = [agree(sizes) if agree else None for sizes in false]
        tried = [answer for answer in answers if answer is not None]
        if False in tried or (tried and _bakes_in(guard.condition)):
            raise GuardRefused(_refusal(name, graph, guard, example), guard)
        if tried:
            where = "at other sizes"
            if isinstance(guard.condition, sympy.core.relational.Relational):
                where = f"where not {show(guard.condition)}"
            notes[f"the same {where}, as was tried: {guard}"] = None
        elif answers:
            required = _edges(guard, example)
            if agree is None and not required:
                raise GuardRefused(_refusal(name, graph, guard, example), guard)
            for size, limits in required.items():
                bounds[size] = _intersection(bounds[size], limits)
            limits_text = "; ".join(f"{size} {_shown(bounds[size])}" for size in required)
            fails = f"the model itself fails where not {show(guard.condition)}"
            notes[f"{limits_text or fails}: {guard}"] = None
    return Settled(bounds, tuple(notes), tuple(limiting))


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


def _intersection(a: Bounds, b: Bounds) -> Bounds:
    highs = [high for high in (a.high, b.high) if high is not None]
    return Bounds(max(a.low, b.low), min(highs, default=None))


_TRIED = 3
_FURTHER = 8
"""How many times as many rows as the least sizes have, the further sizes may have."""


def false_at(
    guard: Guard, bounds: Mapping[str, Bounds], example: Mapping[str, int]
) -> list[Mapping[str, int]]:
    """Assignments of sizes, none of them 0, for which a guard is false. For each combination of
    its relations that is false, such as below the least of two sizes and beyond the other: the
    smallest few, at which both sides of a branch may agree since they meet there, and larger ones
    at the edge and away from it."""
    truth = truth_of(guard.condition)
    relations = [truth_of(part) for part in guard.condition.atoms(sympy.core.relational.Relational)]
    least = {name: replace(limits, low=max(limits.low, 1)) for name, limits in bounds.items()}
    true: set[tuple[int, ...]] = set()
    regions: dict[tuple[bool, ...], list[Mapping[str, int]]] = {}
    for sizes in sizes_around([truth], least, example):
        if truth.holds(sizes):
            true.add(_key(sizes, guard))
        else:
            held = tuple(relation.holds(sizes) for relation in relations)
            regions.setdefault(held, []).append(sizes)
    if not regions:
        far = [sizes for sizes in far_sizes(truth, least, example) if not truth.holds(sizes)]
        return sorted(far, key=lambda sizes: math.prod(sizes.values()))[:_TRIED]
    return [sizes for region in regions.values() for sizes in _some_of(region, guard, true)]


def _some_of(
    region: Sequence[Mapping[str, int]], guard: Guard, true: Set[tuple[int, ...]]
) -> list[Mapping[str, int]]:
    """The first few of a region's sizes, larger ones, and the largest beside one of `true`: 100
    rows of `64 if rows > 100 else rows`, which is 64 at 64 rows too."""
    most = max(_FURTHER * _rows(region[0], guard), 64)
    near = [sizes for sizes in region[_TRIED:] if _rows(sizes, guard) <= most]
    further = sorted(near, key=lambda s: (min(s[n] for n in guard.names), _rows(s, guard)))
    edge = [sizes for sizes in region if not true.isdisjoint(_neighbours(_key(sizes, guard)))]
    edge = [sizes for sizes in edge if _rows(sizes, guard) <= max(4 * _rows(edge[0], guard), 64)]
    last = sorted(edge, key=lambda sizes: _rows(sizes, guard))[-1:]
    tried = [*region[:_TRIED], *further[-1:], *near[len(near) // 2 :][:1], *last]
    return list({_key(sizes, guard): sizes for sizes in tried}.values())


def _key(sizes: Mapping[str, int], guard: Guard) -> tuple[int, ...]:
    return tuple(size for name, size in sorted(sizes.items()) if name in guard.names)


def _neighbours(key: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The sizes that differ by 1 in one of them."""
    for axis, size in enumerate(key):
        for other in (size - 1, size + 1):
            yield (*key[:axis], other, *key[axis + 1 :])


def _rows(sizes: Mapping[str, int], guard: Guard) -> int:
    return math.prod(sizes[name] for name in guard.names)


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
