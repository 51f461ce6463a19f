"""Replacements of int(), float(), len(), max() and min() for the user's code during a capture.

Python's own functions return plain numbers, which would fix a size at the example's. These keep
symbolic numbers symbolic, and behave as Python's for all other values.
"""

from __future__ import annotations

import builtins
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch

from moec.capture.speculate.sites import Foreign
from moec.capture.speculate.symbols import is_symbolic


class _Meta(type):
    """Makes `isinstance(x, int)` and `type(x) == int` work as with Python's int."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, builtins.int | torch.SymInt)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, builtins.int)

    def __eq__(cls, other: object) -> bool:
        return other is builtins.int or other is cls

    def __hash__(cls) -> int:
        return hash(builtins.int)

    def __call__(cls, value: Any = 0, *rest: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.item()
        if isinstance(value, torch.SymInt):
            return value
        if is_symbolic(value):
            return torch.sym_int(value)  # type: ignore[no-untyped-call]
        return builtins.int(value, *rest)


class Integer(builtins.int, metaclass=_Meta):
    """Replaces int: symbolic sizes are instances of it."""


def _float(value: Any = 0.0) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.item()
    if is_symbolic(value):
        number = torch.sym_float(value)  # type: ignore[no-untyped-call]
        if isinstance(value, torch.SymInt):
            setattr(number, _OF, value)
        return number
    return builtins.float(value)


_OF = "moec_integer"
"""The attribute of a symbolic float that holds the integer it was converted from."""


def integer_of(value: Any) -> Any:
    """The integer that float() converted to a symbolic float; any other value unchanged."""
    return getattr(value, _OF, value) if isinstance(value, torch.SymFloat) else value


def _extreme(two: Callable[[Any, Any], Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def extreme(*values: Any, **options: Any) -> Any:
        items = (
            list(values[0]) if len(values) == 1 and isinstance(values[0], list | tuple) else values
        )
        if options or len(items) < 2 or not any(map(is_symbolic, items)):
            return plain(*values, **options)
        result = items[0]
        for item in items[1:]:
            result = two(result, item)
        return result

    return extreme


def _len(value: Any) -> Any:
    value = getattr(value, "tensor", value)  # the length of a HitRows is that of its tensor
    return value.shape[0] if isinstance(value, torch.Tensor) else builtins.len(value)


SHADOWS: Mapping[str, Any] = {
    "int": Integer,
    "float": _float,
    "len": _len,
    "max": _extreme(torch.sym_max, max),
    "min": _extreme(torch.sym_min, min),
}


_TOOLS = frozenset({"moec", "pytest", "_pytest", "hypothesis"})
"""Packages that a user's file may import but whose code is not part of a model."""


def python_type(value: Any) -> Any:
    """`value`, or Python's own type for a replacement: torch takes int and float as dtypes."""
    if value is Integer:
        return builtins.int
    return builtins.float if value is _float else value


def user_globals(module: torch.nn.Module, foreign: Foreign) -> Iterator[dict[str, Any]]:
    """The globals of all modules in which the code of `module` may look up names: those of its
    classes, of values in their attributes, and of functions and classes that these import."""
    classes = {base.__module__ for part in module.modules() for base in type(part).__mro__}
    held = [value for part in module.modules() for value in vars(part).values()]
    classes |= {v.__module__ if isinstance(v, FunctionType) else type(v).__module__ for v in held}
    pending, visited = sorted(classes - {"builtins"}), set[str]()
    while pending:
        name = pending.pop()
        source = sys.modules.get(name)
        if name in visited or source is None:
            continue
        if not _users(source, foreign, name in classes):
            continue
        visited.add(name)
        yield vars(source)
        for value in list(vars(source).values()):
            value = inspect.unwrap(value) if isinstance(value, FunctionType) else value
            if isinstance(value, FunctionType | type):
                pending.append(value.__module__)
            elif isinstance(value, ModuleType) and _near(value.__name__, name):
                pending.append(value.__name__)


def _users(source: ModuleType, foreign: Foreign, held: bool) -> bool:
    file, package = getattr(source, "__file__", None), source.__name__.split(".")[0]
    if package in sys.stdlib_module_names - {"__main__"} or (package in _TOOLS and not held):
        return False
    return source.__name__ == "__main__" or not str(file).startswith(foreign.prefixes)


def _near(name: str, other: str) -> bool:
    return name.split(".")[0] == other.split(".")[0]
