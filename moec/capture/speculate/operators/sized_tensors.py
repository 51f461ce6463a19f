"""Hooks for tensors of one number that is computed of sizes: capacities as DeepSpeed has them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moec.capture.intercept.substitutes import integer_of
from moec.capture.speculate.facts.rounding import ROUNDINGS, Rounding
from moec.capture.speculate.facts.singles import (
    OPERATIONS,
    Single,
    combined,
    rounded_single,
    single_of,
)
from moec.capture.speculate.operators.hooks import Hook, Hooks, Trace
from moec.errors import CaptureError


def full(size: Any, dtype: torch.dtype) -> Any:
    """A tensor of one number, which may be symbolic."""
    return torch.full((), size, dtype=dtype)


def compared(relation: Callable[[Any, Any], Any], trace: Trace, func: Hook, a: Any, b: Any) -> Any:
    """Compares sizes in tensors as sizes, and of a symbolic float that was made from an
    integer, whose expression is known, that integer."""
    sizes = [trace.facts.of(x).size if isinstance(x, torch.Tensor) else x for x in (a, b)]
    if None not in sizes:
        return trace.facts.note(func(a, b), condition=relation(*sizes))
    if integer_of(a) is a and integer_of(b) is b:
        return NotImplemented
    return func(integer_of(a), integer_of(b))


def single(trace: Trace, value: Any) -> Single | None:
    if not isinstance(value, torch.Tensor):
        return single_of(value, trace.sizes)
    fact = trace.facts.of(value)
    if value.ndim or value.dtype != torch.float32:
        return None
    constant = isinstance(fact.size, int | float)
    return fact.float32 or (single_of(fact.size, trace.sizes) if constant else None)


def arithmetic(
    operation: Callable[[Any, Any], Any],
    trace: Trace,
    func: Hook,
    a: Any,
    b: Any,
    *rest: Any,
    **options: Any,
) -> Any:
    """Arithmetic of a float32 number and one that is computed of a size. The tensor has no
    value where a symbolic float is involved: only its rounding has."""
    left, right = single(trace, a), single(trace, b)
    result = combined(operation, left, right) if left and right else None
    if rest or options or result is None or result.of is None:
        return NotImplemented
    exact = not any(isinstance(x, torch.SymFloat) or trace.facts.of(x).float32 for x in (a, b))
    return trace.facts.note(func(a, b) if exact else torch.zeros(()), float32=result)


def rounded(
    how: Rounding, trace: Trace, func: Hook, tensor: torch.Tensor, *_: Any, **__: Any
) -> Any:
    fact = trace.facts.of(tensor)
    if fact.size is not None:
        size = getattr(math, how)(fact.size)
        return trace.facts.note(full(size, tensor.dtype), size=size)
    if fact.float32 is None:
        return NotImplemented
    size = rounded_single(fact.float32, how)
    if size is None:
        raise CaptureError(
            "a size that a tensor computes in single precision rounds as no integer "
            "division does: compute it in Python floats"
        )
    return trace.facts.note(full(size, tensor.dtype), size=size)


def cast(trace: Trace, func: Hook, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """An integer that is known stays a number, on both sides of a branch that chooses it."""
    size = trace.facts.of(tensor).size
    if tensor.ndim or not isinstance(size, int | torch.SymInt):
        return NotImplemented
    result = func(tensor, *args, **kwargs)
    if result.is_floating_point():
        return NotImplemented
    return trace.facts.note(full(size, result.dtype), size=size)


SIZING: Hooks = {
    **{name: partial(compared, getattr(operator, name)) for name in ("lt", "le", "gt", "ge")},
    **{name: partial(arithmetic, operation) for name, operation in OPERATIONS.items()},
    **{name: partial(rounded, name) for name in ROUNDINGS},
    **dict.fromkeys(("to", "long", "int"), cast),
}
