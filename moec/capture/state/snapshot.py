"""Places outside tensors that hold the values of a module, and snapshots of what they hold.

A snapshot gives a module back as it was: a trace of a module that fills a table at its first call

    if self.positions is None or len(self.positions) < n:
        self.positions = torch.arange(n)

begins without the tables of trial runs, which would be constants of one length, and leaves none of
its own behind: they have no data.
"""

from __future__ import annotations

import operator
from collections import deque
from dataclasses import dataclass, field
from types import CellType
from typing import Any

import numpy as np
import torch

CONSTANTS = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, range)
ELEMENTS = object()
"""The key of the slot of all elements of a container."""
_MISSING = object()
_FAR = 1000


@dataclass(frozen=True)
class Slot:
    """One place: a key of a table of attributes or globals, an attribute of a class, a cell, or all
    elements of a container. `words` name it for a message; `name` is how code names it, as `CALLS`,
    or `.count` for an attribute. A slot without words is a table of torch: it goes back only."""

    owner: Any
    key: Any
    words: str
    name: str

    @property
    def place(self) -> tuple[int, Any]:
        return id(self.owner), self.key

    def put(self, value: Any) -> None:
        """Fills the slot; _MISSING empties it."""
        match self.owner:
            case _ if self.key is ELEMENTS:
                _refill(self.owner, value)
            case CellType():
                self.owner.cell_contents = value
            case type() if value is _MISSING:
                delattr(self.owner, self.key)
            case type():
                setattr(self.owner, self.key, value)
            case _ if value is _MISSING:
                self.owner.pop(self.key, None)
            case _:
                self.owner[self.key] = value


@dataclass
class Snapshot:
    """What all slots hold, by owner and key; of a container, a copy.

    `owners` are tables and classes with slots, by their ids. `parts` has the tables of parameters
    and submodules, with the path of their module and the names in them.
    """

    owners: dict[int, Any] = field(default_factory=dict)
    values: dict[tuple[int, Any], tuple[Slot, Any]] = field(default_factory=dict)
    parts: dict[int, tuple[dict[str, Any], str, frozenset[str]]] = field(default_factory=dict)

    def changed(self, later: Snapshot) -> list[Slot]:
        """The slots that hold something else in `later`, or did not exist before it. Containers
        that did not exist are values of such slots."""
        return [
            slot
            for key, (slot, value) in later.values.items()
            if (key in self.values or key[0] in self.owners)
            and slot.words
            and not _equal(self.values.get(key, (slot, _MISSING))[1], value)
        ]

    def counted(self, later: Snapshot) -> list[tuple[Slot, Any]]:
        """The slots that have another number, or a longer list, in `later`, with the value that
        many further calls would leave."""
        pairs = [
            (slot, ahead(self.values[key][1], value), value)
            for key, (slot, value) in later.values.items()
            if key in self.values
        ]
        return [(slot, far) for slot, far, value in pairs if far is not value]

    def new_parts(self, later: Snapshot) -> list[str]:
        """The paths of the parameters and submodules that did not exist before `later`."""
        return [
            f"{path}.{name}"
            for key, (_, path, names) in later.parts.items()
            for name in sorted(names - self.parts.get(key, (None, "", names))[2])
        ]

    def restore(self, later: Snapshot) -> None:
        """Gives every slot that changed what it held here, and removes new parts."""
        for table, _, names in self.parts.values():
            for name in table.keys() - names:
                del table[name]
        for key, (slot, value) in self.values.items():
            after = later.values.get(key, (slot, _MISSING))[1]
            is_back = _holds(slot.owner, value) if slot.key is ELEMENTS else value is after
            if not is_back:
                slot.put(value)
        for key, (slot, _) in later.values.items():
            if key not in self.values and key[0] in self.owners:
                slot.put(_MISSING)


def ahead(before: Any, after: Any) -> Any:
    """`after`, as many further calls would leave it; itself where it counts nothing."""
    match before, after:
        case (int() | float(), int() | float()) if type(before) is type(after) is not bool:
            return after if after == before else after + _FAR * (after - before)
        case (dict(), dict()):
            table = {key: ahead(before.get(key), value) for key, value in after.items()}
            return table if any(table[key] is not after[key] for key in table) else after
        case (list() | deque(), list() | deque()):
            more = [after[-1]] * _FAR if len(after) > len(before) else []
            far = [*map(ahead, before, after), *list(after)[len(before) :], *more]
            return far if more or any(map(operator.is_not, far, after)) else after
    return after


def _equal(value: Any, other: Any) -> bool:
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, np.ndarray):
        return bool(np.array_equal(value, other))
    if isinstance(value, set):
        return bool(value == other)
    if isinstance(value, tuple | list | deque | dict):
        return len(value) == len(other) and all(map(_equal, _parts(value), _parts(other)))
    return isinstance(value, CONSTANTS) and repr(value) == repr(other)


def _parts(container: Any) -> list[Any]:
    """The elements of a container, and its keys."""
    values = container.values() if isinstance(container, dict) else ()
    return [*container, *values]


def _holds(container: Any, copy: Any) -> bool:
    """Whether a container has the very elements of a copy of it."""
    if isinstance(container, np.ndarray):
        return bool(np.array_equal(container, copy))
    return len(container) == len(copy) and all(map(operator.is_, _parts(container), _parts(copy)))


def _refill(container: Any, elements: Any) -> None:
    if isinstance(container, np.ndarray):
        container[...] = elements
        return
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(elements)
