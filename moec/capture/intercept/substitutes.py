"""Python's own functions and types for the user's code: int, float, len, max, isinstance, ...

Python requires the results of `int` and `float` to be plain numbers, which would fix a size at the
example's, and for it a symbolic size is no int. These keep symbolic numbers symbolic and take them
for numbers, and behave as Python's for all other values.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

_SYMBOLIC = (torch.SymInt, torch.SymFloat)
_PLAIN: Mapping[type, Any] = {torch.SymInt: 0, torch.SymFloat: 0.0}


def _substitute(plain: type, call: Callable[..., Any], *symbolic: type) -> Any:
    """A class in the place of `plain`: equal to it, with the same instances and `symbolic` ones; to
    call it is `call`."""
    accepted = (plain, *symbolic)

    class Substitute(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, accepted)

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, accepted)

        def __eq__(cls, other: object) -> bool:
            return other is plain or other is cls

        def __hash__(cls) -> int:
            return hash(plain)

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

    return Substitute(plain.__name__, (plain,), {})


def _int(value: Any = 0, *rest: Any, **options: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, torch.SymFloat):
        return torch.sym_int(value)  # type: ignore[no-untyped-call]
    return builtins.int(value, *rest, **options)


def _float(value: Any = 0.0) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.item()
    if not isinstance(value, _SYMBOLIC):
        return builtins.float(value)
    number = torch.sym_float(value)  # type: ignore[no-untyped-call]
    if isinstance(value, torch.SymInt):
        setattr(number, _OF, value)
    return number


_OF = "moec_integer"
"""The attribute of a symbolic float that holds the integer it was converted from."""


def integer_of(value: Any) -> Any:
    """The integer that float() converted to a symbolic float; any other value unchanged."""
    return getattr(value, _OF, value) if isinstance(value, torch.SymFloat) else value


Integer = _substitute(int, _int, torch.SymInt)
Real = _substitute(float, _float, torch.SymFloat)


def python_type(value: Any) -> Any:
    """`value`, or Python's own type for a replacement: torch takes int and float as dtypes."""
    if value is Integer:
        return builtins.int
    return builtins.float if value is Real else value


def _len(value: Any) -> Any:
    value = getattr(value, "tensor", value)  # the length of a list of rows is that of its tensor
    return value.shape[0] if isinstance(value, torch.Tensor) and value.ndim else builtins.len(value)


def _number(value: Any) -> Any:
    """The number in a tensor that is compared with a symbolic one; other values unchanged."""
    if not isinstance(value, torch.Tensor):
        return value
    return _float(value) if value.is_floating_point() else _int(value)


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


def _isinstance(value: Any, classes: Any) -> bool:
    if isinstance(value, classes):
        return True
    plain = _PLAIN.get(builtins.type(value))
    return plain is not None and isinstance(plain, classes)


def _divmod(a: Any, b: Any) -> Any:
    symbolic = isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt)
    return (a // b, a % b) if symbolic else builtins.divmod(a, b)


def _type(*args: Any, **kwargs: Any) -> Any:
    if len(args) != 1:
        return builtins.type(*args, **kwargs)
    plain = builtins.type(_PLAIN.get(builtins.type(args[0]), args[0]))
    # The caller's int may be a substitute too, and `is` compares with that.
    replaced = sys._getframe(2).f_globals.get(plain.__name__)
    return replaced if plain in (int, float) and replaced else plain


TYPES: Mapping[str, Any] = {
    "isinstance": _isinstance,
    "type": _substitute(type, _type),
    "divmod": _divmod,
}
"""Of all user code: they compute nothing that torch.export cannot trace."""

CONVERSIONS: Mapping[str, Any] = {"int": Integer, "float": Real, "len": _len}
"""The functions whose results Python requires to be plain numbers."""

SHADOWS: Mapping[str, Any] = {
    **CONVERSIONS,
    "max": _extreme(torch.sym_max, max),
    "min": _extreme(torch.sym_min, min),
}
