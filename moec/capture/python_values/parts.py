"""Parts of values that a module replaces as a whole, such as one field of a named tuple.

    self.config = self.config._replace(calls=self.config.calls + 1)

changes one field; the others are what they were.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterable
from types import SimpleNamespace
from typing import Any

Path = tuple[Hashable, ...]
"""The keys that lead from a value to a part of it; () is the value itself."""

_MOST_PARTS = 50


def differing(value: Any, other: Any, equal: Callable[[Any, Any], bool]) -> list[Path]:
    """The parts in which two values differ: [()] where they have no equal keys."""
    keys = _keys(value)
    if value is other or type(value) is not type(other) or not keys or keys != _keys(other):
        return [()]
    pairs = [(key, _part(value, key), _part(other, key)) for key in keys]
    return [
        (key, *rest)
        for key, one, another in pairs
        if not equal(one, another)
        for rest in differing(one, another, equal)
    ]


def with_parts(
    value: Any, paths: Iterable[Path], words: str, change: Callable[[Any, str], Any]
) -> Any:
    """`value` with `change(part, words)` in place of the parts at `paths`."""
    below: dict[Hashable, list[Path]] = {}
    for path in paths:
        if not path:
            return change(value, words)
        below.setdefault(path[0], []).append(path[1:])
    keys = _keys(value)
    if not below.keys() <= set(keys):
        return change(value, words)
    parts = {
        key: with_parts(_part(value, key), rest, f"{words}{_shown(value, key)}", change)
        for key, rest in below.items()
    }
    if isinstance(value, tuple):
        elements = [parts.get(index, element) for index, element in enumerate(value)]
        return value._make(elements) if hasattr(value, "_make") else tuple(elements)
    changed = copy.copy(value)
    for key, part in parts.items():
        if isinstance(changed, dict):
            changed[key] = part
        else:
            object.__setattr__(changed, str(key), part)
    return changed


def _keys(value: Any) -> list[Hashable]:
    """The keys of a value's parts; none for a value that is a whole."""
    if isinstance(value, tuple) and (type(value) is tuple or hasattr(value, "_make")):
        keys: list[Hashable] = list(range(len(value)))
    elif type(value) is dict:
        keys = list(value)
    elif type(value) is SimpleNamespace:
        keys = list(vars(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        keys = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    else:
        keys = []
    return keys if len(keys) <= _MOST_PARTS else []


def _part(value: Any, key: Any) -> Any:
    return value[key] if isinstance(value, tuple | dict) else getattr(value, key)


def _shown(value: Any, key: Any) -> str:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f".{value._fields[key]}"
    return f"[{key!r}]" if isinstance(value, tuple | dict) else f".{key}"
