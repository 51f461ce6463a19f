"""Hooks for tensors of one number that is computed of sizes: capacities as DeepSpeed has them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from moec.capture.speculate.hooks import Hook, Hooks, Trace
from moec.capture.speculate.python_numbers import integer_of
from moec.capture.speculate.rounding import ROUNDINGS, Rounding
from moec.capture.speculate.singles import (
    OPERATIONS,
    Single,
    combined,
    rounded_single,
    single_of,
)
from moec.errors import CaptureError


def full(size: Any, dtype: torch.dtype) -> Any:
    """A tensor of one number, which may be symbolic."""
    return torch.full((), size, dtype=dtype)


def sizing_hooks(trace: Trace) -> Hooks:
    facts = trace.facts

    def compared(relation: Callable[[Any, Any], Any]) -> Hook:
        def hook(func: Hook, a: Any, b: Any) -> Any:
            """Compares sizes in tensors as sizes, and of a symbolic float that was made from an
            integer, whose expression is known, that integer."""
            sizes = [facts.of(x).size if isinstance(x, torch.Tensor) else x for x in (a, b)]
            if None not in sizes:
                return facts.note(func(a, b), condition=relation(*sizes))
            if integer_of(a) is a and integer_of(b) is b:
                return NotImplemented
            return func(integer_of(a), integer_of(b))

        return hook

    def single(value: Any) -> Single | None:
        if not isinstance(value, torch.Tensor):
            return single_of(value, trace.sizes)
        fact = facts.of(value)
        if value.ndim or value.dtype != torch.float32:
            return None
        constant = isinstance(fact.size, int | float)
        return fact.float32 or (single_of(fact.size, trace.sizes) if constant else None)

    def arithmetic(operation: Callable[[Any, Any], Any]) -> Hook:
        def hook(func: Hook, a: Any, b: Any, *rest: Any, **options: Any) -> Any:
            """Arithmetic of a float32 number and one that is computed of a size. The tensor has no
            value where a symbolic float is involved: only its rounding has."""
            left, right = single(a), single(b)
            result = combined(operation, left, right) if left and right else None
            if rest or options or result is None or result.of is None:
                return NotImplemented
            exact = not any(isinstance(x, torch.SymFloat) or facts.of(x).float32 for x in (a, b))
            return facts.note(func(a, b) if exact else torch.zeros(()), float32=result)

        return hook

    def rounded(how: Rounding) -> Hook:
        def hook(func: Hook, tensor: torch.Tensor, *_: Any, **__: Any) -> Any:
            fact = facts.of(tensor)
            if fact.size is not None:
                size = getattr(math, how)(fact.size)
                return facts.note(full(size, tensor.dtype), size=size)
            if fact.float32 is None:
                return NotImplemented
            size = rounded_single(fact.float32, how)
            if size is None:
                raise CaptureError(
                    "a size that a tensor computes in single precision rounds as no integer "
                    "division does: compute it in Python floats"
                )
            return facts.note(full(size, tensor.dtype), size=size)

        return hook

    def cast(func: Hook, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """An integer that is known stays a number, on both sides of a branch that chooses it."""
        size = facts.of(tensor).size
        if tensor.ndim or not isinstance(size, int | torch.SymInt):
            return NotImplemented
        result = func(tensor, *args, **kwargs)
        if result.is_floating_point():
            return NotImplemented
        return facts.note(full(size, result.dtype), size=size)

    return {
        **{name: compared(getattr(operator, name)) for name in ("lt", "le", "gt", "ge")},
        **{name: arithmetic(operation) for name, operation in OPERATIONS.items()},
        **{name: rounded(name) for name in ROUNDINGS},
        **dict.fromkeys(("to", "long", "int"), cast),
    }
