"""Dictionaries of a module that are keyed by sizes, while it is traced.

    if length not in self.tables:
        self.tables[length] = torch.arange(length)

A symbolic size has no hash. A SizeTable compares such a key with each key of the table, so that a
guard arises where the table has a key that the size may equal.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moec.capture.state.reach import snapshot, values_kept
from moec.capture.state.snapshot import ELEMENTS

_MISSING = object()


@contextmanager
def tables_by_size(module: torch.nn.Module) -> Iterator[None]:
    """While open, the dictionaries of the module take symbolic sizes as keys."""
    with values_kept(module):
        tables: dict[int, Any] = {}
        for slot, value in snapshot(module).values.values():
            if slot.key is ELEMENTS:
                continue
            if type(value) in (dict, OrderedDict, defaultdict):
                slot.put(tables.setdefault(id(value), SizeTable(value)))
        yield


def is_size_as_key(error: Exception) -> bool:
    """Whether Python had to hash a symbolic size."""
    text = str(error)
    return isinstance(error, TypeError) and "unhashable type" in text and "Sym" in text


class _SizeKey:
    """A key with symbolic sizes, as the key of a dictionary: equal to itself only."""

    def __init__(self, key: Any) -> None:
        self.key = key


class SizeTable(OrderedDict[Any, Any]):
    """A dictionary whose keys may be symbolic sizes, or tuples of them."""

    def __init__(self, table: dict[Any, Any]) -> None:
        super().__init__(table)
        self.default: Callable[[], Any] | None = getattr(table, "default_factory", None)

    def _stored(self, key: Any) -> Any:
        """The key under which the dictionary has `key`, or _MISSING."""
        symbolic = _is_symbolic(key)
        if not symbolic and super().__contains__(key):
            return key
        for stored in super().__iter__():
            is_size = type(stored) is _SizeKey
            if (symbolic or is_size) and _equal(stored.key if is_size else stored, key):
                return stored
        return _MISSING

    def __contains__(self, key: Any) -> bool:
        return self._stored(key) is not _MISSING

    def __getitem__(self, key: Any) -> Any:
        stored = self._stored(key)
        if stored is not _MISSING:
            return super().__getitem__(stored)
        if self.default is None:
            raise KeyError(key)
        self[key] = value = self.default()
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        stored = self._stored(key)
        if stored is _MISSING:
            stored = _SizeKey(key) if _is_symbolic(key) else key
        super().__setitem__(stored, value)

    def get(self, key: Any, default: Any = None) -> Any:
        stored = self._stored(key)
        return default if stored is _MISSING else super().__getitem__(stored)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def __iter__(self) -> Iterator[Any]:
        return (k.key if type(k) is _SizeKey else k for k in super().__iter__())


def _is_symbolic(key: Any) -> bool:
    if isinstance(key, tuple):
        return any(map(_is_symbolic, key))
    return isinstance(key, torch.SymInt | torch.SymFloat)


def _equal(stored: Any, key: Any) -> bool:
    """Whether two keys are equal; compares sizes last, since that may set a guard."""
    if isinstance(stored, tuple) and isinstance(key, tuple):
        pairs = sorted(zip(stored, key, strict=False), key=lambda pair: _is_symbolic(pair))
        return len(stored) == len(key) and all(_equal(a, b) for a, b in pairs)
    if _is_symbolic(stored) or _is_symbolic(key):
        numbers = (int, float, torch.SymInt, torch.SymFloat)
        return isinstance(stored, numbers) and isinstance(key, numbers) and bool(stored == key)
    return bool(stored == key)
