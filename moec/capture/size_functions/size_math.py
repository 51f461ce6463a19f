"""Functions of Python's math module, and of its integers, on symbolic sizes.

    x / math.sqrt(x.shape[0])    math.isqrt(n)    1 << (n - 1).bit_length()

Python's own functions return plain numbers, which would fix the size at the example's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import BuiltinFunctionType
from typing import Any
from unittest import mock

import torch

from moec.capture.size_functions.sizes_as_numbers import LIBRARIES
from moec.capture.speculate.sites import foreign
from moec.capture.speculate.user_globals import user_globals
from moec.capture.user_code import size_nodes
from moec.capture.user_code.size_domains import domains_recorded, record_domain
from moec.capture.user_code.size_nodes import size_nodes_allowed

_SYMBOLIC = (torch.SymInt, torch.SymFloat)


@contextmanager
def math_of_sizes(module: torch.nn.Module) -> Iterator[None]:
    """While open, the functions of the math module return symbolic numbers for symbolic numbers,
    also under the names by which files of the user's code of `module` imported them, and arithmetic
    on sizes records where it is defined."""
    others = foreign(name for name in LIBRARIES if name in sys.modules)
    with ExitStack() as stack:
        functions = {
            name: _wrapped(getattr(math, name), form) for name, form in _SYMBOLIC_FORMS.items()
        }
        replacements = {getattr(math, name): function for name, function in functions.items()}
        stack.enter_context(mock.patch.dict(vars(math), functions))
        for names in user_globals(module, others):
            imports = {
                name: replacements[value]
                for name, value in names.items()
                if isinstance(value, BuiltinFunctionType) and value in replacements
            }
            stack.enter_context(mock.patch.dict(names, imports))
        stack.enter_context(mock.patch.object(torch.SymInt, "bit_length", _bit_length))
        for kind in _SYMBOLIC:
            for method, of_floats in _OF_FLOATS.items():
                for name, swapped in ((f"__{method}__", False), (f"__r{method}__", True)):
                    function = _binary(getattr(kind, name), of_floats, swapped)
                    stack.enter_context(mock.patch.object(kind, name, function))
        for method, of_mask in _OF_MASKS.items():
            for name in (f"__{method}__", f"__r{method}__"):
                function = _with_mask(getattr(torch.SymInt, name), of_mask)
                stack.enter_context(mock.patch.object(torch.SymInt, name, function))
        stack.enter_context(mock.patch.object(torch.SymInt, "__invert__", _invert, create=True))
        stack.enter_context(size_nodes_allowed())
        stack.enter_context(domains_recorded())
        yield


def _wrapped(plain: Callable[..., Any], symbolic: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def function(*arguments: Any) -> Any:
        sizes = any(isinstance(argument, _SYMBOLIC) for argument in arguments)
        return symbolic(*arguments) if sizes else plain(*arguments)

    return function


def _float(value: Any) -> Any:
    return torch.sym_float(value)  # type: ignore[no-untyped-call]


def _log(value: Any, base: Any = None) -> Any:
    if base is not None:
        return _log(value) / _log(base)
    record_domain(value, "positive")
    return size_nodes.log(_float(value))


def _log_to(base: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def logarithm(value: Any) -> Any:
        record_domain(value, "positive")
        return base(_float(value))

    return logarithm


def _isqrt(size: Any) -> Any:
    return math.floor(torch.sym_sqrt(_float(size)))


def _bit_length(size: Any) -> Any:
    """2 * size + 1 has one bit more, and is never 0, which has no logarithm."""
    return math.floor(size_nodes.log2(_float(2 * size + 1)))


def _binary(
    plain: Callable[[Any, Any], Any], of_floats: Callable[[Any, Any], Any], swapped: bool
) -> Callable[[Any, Any], Any]:
    """An operator of two numbers that is `of_floats` where one of them is a float."""

    @wraps(plain)
    def operate(number: Any, other: Any) -> Any:
        floats = any(isinstance(x, float | torch.SymFloat) for x in (number, other))
        if not floats or not isinstance(other, int | float | torch.SymInt | torch.SymFloat):
            return plain(number, other)
        a, b = (other, number) if swapped else (number, other)
        return of_floats(_float(a), _float(b))

    return operate


def _with_mask(
    plain: Callable[[Any, Any], Any], of_mask: Callable[[Any, int], Any]
) -> Callable[[Any, Any], Any]:
    """An operator of a size and a mask, which is a number."""

    @wraps(plain)
    def operate(size: Any, mask: Any) -> Any:
        return of_mask(size, int(mask)) if isinstance(mask, int) else plain(size, mask)

    return operate


def _and(size: Any, mask: int) -> Any:
    if mask < 0:
        return size // -mask * -mask if _is_power(-mask) else size - _and(size, ~mask)
    return sum(size // low % (high // low) * low for low, high in _runs(mask))


def _runs(mask: int) -> Iterator[tuple[int, int]]:
    """The first bit of each run of ones, and the bit that follows the run."""
    while mask:
        low = mask & -mask
        high = (mask + low) & -(mask + low)
        yield low, high
        mask -= high - low


def _or(size: Any, mask: int) -> Any:
    if _is_power(mask + 1):
        return size // (mask + 1) * (mask + 1) + mask
    return size + mask - _and(size, mask)


def _xor(size: Any, mask: int) -> Any:
    return size + mask - 2 * _and(size, mask)


def _invert(size: Any) -> Any:
    return -size - 1


def _is_power(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


_OF_FLOATS: Mapping[str, Callable[[Any, Any], Any]] = {
    "floordiv": size_nodes.floor_quotient,
    "mod": size_nodes.remainder,
}
_OF_MASKS: Mapping[str, Callable[[Any, int], Any]] = {"and": _and, "or": _or, "xor": _xor}
_SYMBOLIC_FORMS: Mapping[str, Callable[..., Any]] = {
    "sqrt": lambda value: torch.sym_sqrt(_float(value)),
    "isqrt": _isqrt,
    "pow": lambda base, power: _float(base) ** _float(power),
    "log": _log,
    "log2": _log_to(size_nodes.log2),
    "log10": _log_to(size_nodes.log10),
    "exp": lambda value: size_nodes.exp(_float(value)),
}
