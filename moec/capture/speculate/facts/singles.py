"""Floats that 0-d tensors compute of a size: in single precision, which Python's floats are not.

    capacity = torch.ceil(tokens / experts * torch.tensor(1.2)).to(torch.int64)

35 tokens and 6 experts give 8 here, and math.ceil(35 / 6 * 1.2) is 7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch

from moec.capture.speculate.facts.rounding import Function, Rounding, as_division, function_of
from moec.capture.speculate.facts.symbols import expression

OPERATIONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "radd": lambda a, b: b + a,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: b - a,
    "mul": lambda a, b: a * b,
    "rmul": lambda a, b: b * a,
    "div": lambda a, b: a / b,
    "truediv": lambda a, b: a / b,
    "rtruediv": lambda a, b: b / a,
}


@dataclass(frozen=True)
class Single:
    """A float32 number. `at` computes it, as torch does, for each of many values of the size `of`,
    which is None for a constant. `number` is that size in the trace."""

    at: Callable[[Any], Any]
    of: Any = None
    number: Any = None


def single_of(value: Any, sizes: Mapping[Any, Any]) -> Single | None:
    """A Python number, or one that Python computes in doubles of one of `sizes`, as a Single."""
    if isinstance(value, int | float):
        return Single(lambda counts: np.full(counts.shape, value, dtype=np.float32))
    if not isinstance(value, torch.SymFloat | torch.SymInt):
        return None
    tokens = sympy.Symbol("tokens", integer=True, positive=True)
    for size, number in sizes.items():
        alone = expression(value).xreplace({size: tokens})
        if alone.free_symbols == {tokens}:
            return _rounded_once(function_of(alone, tokens), size, number)
    return None


def _rounded_once(function: Function, size: Any, number: Any) -> Single:
    return Single(lambda counts: function(counts).astype(np.float32), size, number)


def combined(operation: Callable[[Any, Any], Any], a: Single, b: Single) -> Single | None:
    """The result of an operation; None where it depends on two sizes."""
    if a.of is not None and b.of is not None and a.of != b.of:
        return None
    sized = b if a.of is None else a
    return Single(lambda counts: operation(a.at(counts), b.at(counts)), sized.of, sized.number)


def rounded_single(single: Single, how: Rounding) -> Any:
    """A Single rounded, as an integer division of its size; None where no such division rounds
    equally."""
    return None if single.of is None else as_division(single.at, single.number, how)
