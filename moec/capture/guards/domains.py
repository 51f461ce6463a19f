"""Guards of the arithmetic on sizes: where one is false, the module itself raises an error."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
from torch.export import ExportedProgram

from moec.capture.guards.conditions import as_bounds
from moec.capture.guards.guards import Guard, shape_env
from moec.capture.intercept.arithmetic import Domain, domains_of
from moec.errors import CaptureError, IRError
from moec.ir.sizes.dims import Bounds, nearly_from_torch
from moec.ir.sizes.thresholds import first_true, interval_around, sizes_around, truth_of


def domain_guards(exported: ExportedProgram, rename: Mapping[str, str]) -> tuple[Guard, ...]:
    """The conditions under which the user's arithmetic on sizes is defined, without those that
    always hold. Arithmetic on numbers of data is left out. Raises CaptureError for an operand that
    cannot be converted."""
    env = shape_env(exported)
    guards: dict[sympy.Basic, Guard] = {}
    for domain in domains_of(env):
        operand = env.replace(domain.operand)
        if {symbol.name for symbol in operand.free_symbols} <= rename.keys():
            condition = _condition(domain, operand, rename)
            guard = Guard(condition, domain.file, domain.line, domain.function, is_domain=True)
            if condition != sympy.true:
                guards.setdefault(condition, guard)
    return tuple(guards.values())


def _condition(domain: Domain, operand: sympy.Expr, rename: Mapping[str, str]) -> sympy.Basic:
    try:
        number = nearly_from_torch(operand, rename)
    except (IRError, AttributeError, TypeError, ValueError) as error:
        where = Guard(operand, domain.file, domain.line, domain.function)
        raise CaptureError(
            f"a number made of sizes cannot be read: {operand} ({error})\n  {where}\n"
            "  fix the sizes that it depends on: dynamic_shapes"
        ) from None
    if not number.is_nonnegative:
        return sympy.Ne(number, 0)
    return sympy.Ge(number, 1) if number.is_integer else sympy.Gt(number, 0)


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
