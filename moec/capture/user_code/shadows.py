"""Replacements of int(), float(), len(), max() and min() for the user's code during a capture.

Python's own functions return plain numbers, which would fix a size at the example's. These keep
symbolic numbers symbolic, and behave as Python's for all other values.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from typing import Any

import torch

_SYMBOLIC = (torch.SymInt, torch.SymFloat)


class _IntegerType(type):
    """Makes `isinstance(x, int)` and `type(x) == int` work as with Python's int."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, builtins.int | torch.SymInt)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, builtins.int | torch.SymInt)

    def __eq__(cls, other: object) -> bool:
        return other is builtins.int or other is cls

    def __hash__(cls) -> int:
        return hash(builtins.int)

    def __call__(cls, value: Any = 0, *rest: Any, **options: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.item()
        if isinstance(value, torch.SymInt):
            return value
        if isinstance(value, torch.SymFloat):
            return torch.sym_int(value)  # type: ignore[no-untyped-call]
        return builtins.int(value, *rest, **options)


class Integer(builtins.int, metaclass=_IntegerType):
    """Replaces int: symbolic sizes are instances of it, and are returned unchanged."""


class _RealType(type):
    """Makes `isinstance(x, float)` and `type(x) == float` work as with Python's float."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, builtins.float | torch.SymFloat)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, builtins.float | torch.SymFloat)

    def __eq__(cls, other: object) -> bool:
        return other is builtins.float or other is cls

    def __hash__(cls) -> int:
        return hash(builtins.float)

    def __call__(cls, value: Any = 0.0) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.item()
        if not isinstance(value, _SYMBOLIC):
            return builtins.float(value)
        number = torch.sym_float(value)  # type: ignore[no-untyped-call]
        if isinstance(value, torch.SymInt):
            setattr(number, _OF, value)
        return number


class Real(builtins.float, metaclass=_RealType):
    """Replaces float: symbolic floats are instances of it."""


_OF = "moec_integer"
"""The attribute of a symbolic float that holds the integer it was converted from."""


def integer_of(value: Any) -> Any:
    """The integer that float() converted to a symbolic float; any other value unchanged."""
    return getattr(value, _OF, value) if isinstance(value, torch.SymFloat) else value


def _number(value: Any) -> Any:
    """The number in a tensor that is compared with a symbolic one; other values unchanged."""
    if not isinstance(value, torch.Tensor):
        return value
    return Real(value) if value.is_floating_point() else Integer(value)


def _extreme(two: Callable[[Any, Any], Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def extreme(*values: Any, **options: Any) -> Any:
        items = (
            list(values[0]) if len(values) == 1 and isinstance(values[0], list | tuple) else values
        )
        if options or len(items) < 2 or not any(isinstance(item, _SYMBOLIC) for item in items):
            return plain(*values, **options)
        numbers = [_number(item) for item in items]
        result = numbers[0]
        for number in numbers[1:]:
            result = two(result, number)
        return result

    return extreme


def shadowed(names: Mapping[str, Any], shadows: Mapping[str, Any]) -> dict[str, Any]:
    """The shadows of the functions that a file, with the globals `names`, has not of its own."""
    return {
        name: shadow
        for name, shadow in shadows.items()
        if name not in names or hasattr(names[name], "moec_shadow")
    }


def _len(value: Any) -> Any:
    if hasattr(type(value), "moec_length"):
        return value.moec_length()
    value = getattr(value, "tensor", value)  # the length of a list of rows is that of its tensor
    return value.shape[0] if isinstance(value, torch.Tensor) and value.ndim else builtins.len(value)


def _distinct(kind: type, *values: Any) -> Any:
    """`kind(*values)`, or the classes that occur in a list that has them as `distinct`."""
    distinct = getattr(values[0], "distinct", None) if len(values) == 1 else None
    return kind(*values) if distinct is None else distinct()


class _SetType(type):
    """Makes `isinstance(x, set)` and `type(x) == set` work as with Python's set."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, builtins.set)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, builtins.set)

    def __eq__(cls, other: object) -> bool:
        return other is builtins.set or other is cls

    def __hash__(cls) -> int:
        return hash(builtins.set)

    def __call__(cls, *values: Any) -> Any:
        return _distinct(builtins.set, *values)


class ValueSet(builtins.set[Any], metaclass=_SetType):
    """Replaces set."""


class _FrozenSetType(type):
    """Makes `isinstance(x, frozenset)` and `type(x) == frozenset` work as with Python's."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, builtins.frozenset)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, builtins.frozenset)

    def __eq__(cls, other: object) -> bool:
        return other is builtins.frozenset or other is cls

    def __hash__(cls) -> int:
        return hash(builtins.frozenset)

    def __call__(cls, *values: Any) -> Any:
        return _distinct(builtins.frozenset, *values)


class FrozenValueSet(builtins.frozenset[Any], metaclass=_FrozenSetType):
    """Replaces frozenset."""


CONVERSIONS: Mapping[str, Any] = {"int": Integer, "float": Real, "len": _len}
"""Replacements of the functions whose results Python requires to be plain numbers."""

SHADOWS: Mapping[str, Any] = {
    **CONVERSIONS,
    "max": _extreme(torch.sym_max, max),
    "min": _extreme(torch.sym_min, min),
    "set": ValueSet,
    "frozenset": FrozenValueSet,
}


def python_type(value: Any) -> Any:
    """`value`, or Python's own type for a replacement: torch takes int and float as dtypes."""
    if value is Integer:
        return builtins.int
    return builtins.float if value is Real else value
