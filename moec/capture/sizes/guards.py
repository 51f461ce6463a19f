"""Guards: the conditions on input sizes under which an export is valid."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import sympy
from torch.export import ExportedProgram

from moec.capture.intercept.arithmetic import domains_of
from moec.capture.user_code.sources import is_internal, text_of
from moec.errors import CaptureError, IRError
from moec.ir.graph import Graph, Program
from moec.ir.interpret.outputs import Structure
from moec.ir.sizes.dims import nearly_from_torch, show_dim, symbols
from moec.oracle.cases import Eager


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
class ConvertedExport:
    """The program of an export, the module in eager, the guards of the export, and those that fixed
    an axis of an input: (number of the input, number of its axis)."""

    program: Program
    eager: Eager
    guards: Sequence[Guard] = ()
    fixings: Mapping[tuple[int, int], Guard] = field(default_factory=dict)


@dataclass(frozen=True)
class CaptureForm:
    """One form of a capture: its program, the structure of the module's result, report notes."""

    converted: ConvertedExport
    structure: Structure
    notes: tuple[str, ...] = ()


def guards_of(exported: ExportedProgram, rename: Mapping[str, str]) -> tuple[Guard, ...]:
    """The guards of an export without duplicates and without guards that its inputs' shapes imply,
    after the conditions under which the user's arithmetic on sizes, not on numbers of data, is
    defined.

    Call it before the export is decomposed, because decomposition adds guards. `rename` maps
    torch's symbols to named sizes. Raises CaptureError for a guard that cannot be converted.
    """
    env = shape_env(exported)
    if env is None:
        return ()
    guards: dict[sympy.Basic, Guard] = {}
    for domain in domains_of(env):
        operand = env.replace(domain.operand)
        if {symbol.name for symbol in operand.free_symbols} <= rename.keys():
            raw = Guard(operand, domain.file, domain.line, domain.function)
            guard = _read(raw, partial(_defined, rename=rename))
            if guard.condition != sympy.true:
                guards.setdefault(guard.condition, guard)
    return (*guards.values(), *guards_in(env, rename))


def guards_in(env: Any, rename: Mapping[str, str]) -> tuple[Guard, ...]:
    """The guards in torch's record of the sizes of a trace."""
    guards: dict[sympy.Basic, Guard] = {}
    for each in env.guards:
        guard = replace(guard_at(each), condition=env.replace(each.expr))
        if guard.condition != sympy.true and guard.condition not in guards:
            guards[guard.condition] = _read(guard, partial(_converted, rename=rename))
    return tuple(guards.values())


def _read(guard: Guard, convert: Callable[[Any], sympy.Basic]) -> Guard:
    """A guard over torch's symbols as one over named sizes."""
    try:
        return replace(guard, condition=convert(guard.condition))
    except (IRError, AttributeError, TypeError, ValueError) as error:
        raise CaptureError(
            f"a condition on sizes cannot be read: {guard.condition} ({error})\n  {guard}\n"
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
    return [] if env is None else list(map(guard_at, env.guards))


def guard_at(guard: Any) -> Guard:
    """A guard of torch over torch's symbols, with the user's line that evaluated it."""
    location = guard.sloc.framework_loc
    if not isinstance(location, traceback.FrameSummary) or is_internal(location.filename):
        return Guard(guard.expr)
    return Guard(guard.expr, location.filename, location.lineno or 0, location.name)


def _defined(operand: sympy.Expr, rename: Mapping[str, str]) -> sympy.Basic:
    """Where an operand over torch's symbols is not 0."""
    number = nearly_from_torch(operand, rename)
    if not number.is_nonnegative:
        return sympy.Ne(number, 0)
    return sympy.Ge(number, 1) if number.is_integer else sympy.Gt(number, 0)


_CONNECTIVES = (sympy.And, sympy.Or, sympy.Not)


def _converted(condition: Any, rename: Mapping[str, str]) -> sympy.Basic:
    """A condition over the named sizes, in the functions of `moec.ir.sizes.dims`."""
    if isinstance(condition, _CONNECTIVES):
        return condition.func(*(_converted(a, rename) for a in condition.args))
    if condition in (sympy.true, sympy.false):
        return condition
    if not isinstance(condition, sympy.core.relational.Relational):
        raise IRError("it is no relation")
    left, right = (nearly_from_torch(a, rename) for a in condition.args)
    return condition.func(left, right)


def show(condition: sympy.Basic) -> str:
    """A condition as a person would write it."""
    if isinstance(condition, sympy.core.relational.Relational):
        left, right = condition.args
        return f"{show_dim(left)} {condition.rel_op} {show_dim(right)}"
    return str(condition)


def axes(graph: Graph, size: str) -> str:
    """The axes of the inputs that have this size, as text: "axis 1 of x"; at most three."""
    labels = [
        f"axis {axis} of {value.name}"
        for value in graph.inputs
        for axis, dim in enumerate(value.shape)
        if not isinstance(dim, int) and symbols(dim) == {size}
    ]
    return " and ".join(labels[:3])
