"""What torch decides of floats of sizes while it traces.

    x[: math.isqrt(batch * length)]

torch writes each size as a positive symbol plus a number, and multiplies them out, before it looks
for the range of a float: of b * s - b - s + 1 it finds no sign. The end of the slice then may be
negative, and its length becomes a symbol that has nothing to do with the capacity.

    t = torch.tensor(2.0) * (n / 6)
    y = x * (3 if t > 2 else 1)

torch evaluates operators on literals. It leaves out those with a symbolic integer, but not those
with a symbolic float: the branch would go as in the example, without a guard.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import sympy
import torch

from moec.torch_private import ToFloat, bound_sympy

SYMBOLIC_OPERANDS = (torch.SymInt, torch.SymFloat)
"""In the place of SymInt in torch's file of fake tensors: types of operands that keep an operator
on literals from being evaluated."""


def with_ranges(plain: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of ShapeEnv's static evaluation: a condition on floats is also decided by the
    ranges of the sizes as they are."""

    @wraps(plain)  # torch clears its cache
    def evaluate(env: Any, expr: sympy.Basic, *args: Any, **options: Any) -> Any:
        result = plain(env, expr, *args, **options)
        if result is not None or not isinstance(expr, sympy.Rel) or not expr.has(ToFloat):
            return result
        truth = bound_sympy(expr, env.var_to_range)
        return truth.lower if truth.is_singleton() else None

    return evaluate
