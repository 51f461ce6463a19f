"""int(), float(), len(), max() and min() as the user's code has them during a capture.

Python's own give plain numbers, which would fix a size at the example's. These leave a symbolic
number symbolic and do what Python's do with every other.
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
    """For `isinstance(x, int)` and `type(x) == int`, which hold as ever."""

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
    """int, of which a symbolic size is an instance."""


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
"""The attribute of a symbolic float that holds the integer which it was made of."""


def integer_of(value: Any) -> Any:
    """The integer that a symbolic float was made of by float(); any other value as it is."""
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
    value = getattr(value, "tensor", value)  # a list of rows is as long as its tensor
    return value.shape[0] if isinstance(value, torch.Tensor) else builtins.len(value)


SHADOWS: Mapping[str, Any] = {
    "int": Integer,
    "float": _float,
    "len": _len,
    "max": _extreme(torch.sym_max, max),
    "min": _extreme(torch.sym_min, min),
}


_TOOLS = frozenset({"moec", "pytest", "_pytest", "hypothesis"})
"""Packages that a user's file may import and whose code no model runs."""


def python_type(value: Any) -> Any:
    """`value`, with Python's int where it is ours: torch takes it for a dtype."""
    if value is Integer:
        return builtins.int
    return builtins.float if value is _float else value


def user_globals(module: torch.nn.Module, foreign: Foreign) -> Iterator[dict[str, Any]]:
    """The globals in which the code of `module` looks names up: those of its classes, of what its
    parts hold, and of the functions and classes that these import from elsewhere."""
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
