"""Functions of Python's math module on symbolic sizes, for numbers that scale tensors.

    x / math.sqrt(x.shape[0])

Python's own functions return plain floats, which would fix the size at the example's. A root that
is converted to an integer fixes it, because no expression of sizes has roots; logarithms do too,
because torch exports none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch

from moec.capture.user_code.shadows import SQUARE

_SYMBOLIC = (torch.SymInt, torch.SymFloat)


@contextmanager
def math_of_sizes() -> Iterator[None]:
    """While open, the functions of the math module return symbolic floats for symbolic numbers."""
    with ExitStack() as stack:
        for name, symbolic in _SYMBOLIC_FORMS.items():
            function = _wrapped(getattr(math, name), symbolic)
            stack.enter_context(mock.patch.object(math, name, function))
        to_int = _with_roots_fixed(torch.SymFloat.__int__)
        stack.enter_context(mock.patch.object(torch.SymFloat, "__int__", to_int))
        yield


def _with_roots_fixed(plain: Callable[[Any], int]) -> Callable[[Any], int]:
    def __int__(number: Any) -> int:
        square = getattr(number, SQUARE, None)
        return plain(number) if square is None else int(math.sqrt(int(square)))

    return __int__


def _wrapped(plain: Callable[..., Any], symbolic: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def function(*arguments: Any) -> Any:
        sizes = any(isinstance(argument, _SYMBOLIC) for argument in arguments)
        return symbolic(*arguments) if sizes else plain(*arguments)

    return function


def _root(value: Any) -> Any:
    root = torch.sym_sqrt(_float(value))
    setattr(root, SQUARE, value)
    return root


def _float(value: Any) -> Any:
    return torch.sym_float(value)  # type: ignore[no-untyped-call]


_SYMBOLIC_FORMS: Mapping[str, Callable[..., Any]] = {
    "sqrt": _root,
    "pow": lambda base, power: _float(base) ** _float(power),
}
