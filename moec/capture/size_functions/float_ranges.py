"""Conditions on floats of sizes, decided by the ranges of the floats.

    x[: math.isqrt(batch * length)]    x[: int(len(x) ** 0.75)]

torch writes each size as a positive symbol plus a number, and multiplies them out, before it looks
for the range of a float: of b * s - b - s + 1 it finds no sign. It knows no range of a power. The
end of the slice then may be negative, and its length becomes a symbol that has nothing to do with
the capacity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import ToFloat
from torch.utils._sympy.value_ranges import SymPyValueRangeAnalysis, ValueRanges, bound_sympy


@contextmanager
def float_ranges_known() -> Iterator[None]:
    """While open, torch also decides such a condition by the ranges of the sizes as they are."""
    plain, power = ShapeEnv._maybe_evaluate_static, SymPyValueRangeAnalysis.pow

    @wraps(plain)  # torch clears its cache
    def evaluate(env: ShapeEnv, expr: sympy.Basic, *args: Any, **options: Any) -> Any:
        result = plain(env, expr, *args, **options)
        if result is not None or not isinstance(expr, sympy.Rel) or not expr.has(ToFloat):
            return result
        truth = bound_sympy(expr, env.var_to_range)
        return truth.lower if truth.is_singleton() else None

    def range_of_power(base: Any, exponent: Any) -> Any:
        numbers, exponents = ValueRanges.wrap(base), ValueRanges.wrap(exponent)
        if numbers.lower >= 0 and exponents.lower > 0:
            return ValueRanges(0.0, sympy.oo)
        return power(base, exponent)  # type: ignore[no-untyped-call]

    with (
        mock.patch.object(ShapeEnv, "_maybe_evaluate_static", evaluate),
        mock.patch.object(SymPyValueRangeAnalysis, "pow", range_of_power),
    ):
        yield
