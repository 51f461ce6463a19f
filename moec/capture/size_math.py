"""Functions of Python's math module on symbolic sizes, for numbers that scale tensors.

    x / math.sqrt(x.shape[0])

Python's own functions return plain floats, which would fix the size at the example's. Sizes that
are made of these floats are refused where they are converted to integers (node_converter.py), and
logarithms fix the size, because torch exports none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch

_SYMBOLIC = (torch.SymInt, torch.SymFloat)


@contextmanager
def math_of_sizes() -> Iterator[None]:
    """While open, the functions of the math module return symbolic floats for symbolic numbers."""
    with ExitStack() as stack:
        for name, symbolic in _SYMBOLIC_FORMS.items():
            function = _wrapped(getattr(math, name), symbolic)
            stack.enter_context(mock.patch.object(math, name, function))
        yield


def _wrapped(plain: Callable[..., Any], symbolic: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def function(*arguments: Any) -> Any:
        sizes = any(isinstance(argument, _SYMBOLIC) for argument in arguments)
        return symbolic(*arguments) if sizes else plain(*arguments)

    return function


def _float(value: Any) -> Any:
    return torch.sym_float(value)  # type: ignore[no-untyped-call]


_SYMBOLIC_FORMS: Mapping[str, Callable[..., Any]] = {
    "sqrt": lambda value: torch.sym_sqrt(_float(value)),
    "pow": lambda base, power: _float(base) ** _float(power),
}
