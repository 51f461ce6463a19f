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

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sympy
from torch.export import ExportedProgram

from moec.capture.user_code.sources import is_internal, text_of
from moec.errors import CaptureError, IRError
from moec.ir.graph import Graph
from moec.ir.sizes.dims import nearly_from_torch, show_dim, symbols


@dataclass(frozen=True)
class Guard:
    """A condition on named sizes, and the line of the user's code that evaluated it. Where that of
    a domain is false, Python's arithmetic on the line raises an error: it divides by 0."""

    condition: sympy.Basic
    file: str = ""
    line: int = 0
    function: str = ""
    is_domain: bool = False

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
