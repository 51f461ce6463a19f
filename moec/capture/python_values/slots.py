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
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from types import MemberDescriptorType
from typing import Any

import numpy as np
import torch

from moec.capture.python_values.parts import Path, differing

TEXTUAL = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, range)
MISSING = object()


@dataclass(frozen=True)
class Slot:
    """One place: `kind` is "attribute", "item" (of a container), "global" or "cell". `words` names
    it for a message. `paths` are the parts of its value that are meant."""

    owner: Any
    key: Any
    kind: str
    words: str
    paths: tuple[Path, ...] = ((),)

    @property
    def place(self) -> tuple[int, Any]:
        return id(self.owner), self.key

    def belongs_to(self, slots: Iterable[Slot]) -> bool:
        """Whether all of its parts belong to parts of `slots`."""
        held = [path for slot in slots if slot.place == self.place for path in slot.paths]
        return bool(held) and all(
            any(path[: len(outer)] == outer for outer in held) for path in self.paths
        )

    def put(self, value: Any) -> None:
        """Fills the slot; MISSING empties it."""
        if self.kind == "cell":
            self.owner.cell_contents = value
        elif value is MISSING:
            self._remove()
        elif self.kind in ("item", "global"):
            self.owner[self.key] = value
        elif isinstance(self.owner, type):
            setattr(self.owner, self.key, value)
        elif _is_member(self.owner, self.key):
            object.__setattr__(self.owner, self.key, value)
        else:
            attributes_of(self.owner)[self.key] = value

    def _remove(self) -> None:
        if isinstance(self.owner, type):
            delattr(self.owner, self.key)
        elif self.kind == "global":
            self.owner.pop(self.key, None)
        elif _is_member(self.owner, self.key):
            object.__delattr__(self.owner, self.key)
        else:
            attributes_of(self.owner).pop(self.key, None)


@dataclass
class Snapshot:
    """What all slots hold, by owner and key, and copies of the containers' elements.

    `values` has (slot, value); containers are compared by their copies. `parts` has the tables of
    parameters and submodules, with the path of their module and the names in them.
    """

    values: dict[tuple[int, Any], tuple[Slot, Any]] = field(default_factory=dict)
    contents: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    parts: dict[int, tuple[dict[str, Any], str, frozenset[str]]] = field(default_factory=dict)

    def changed(self, later: Snapshot) -> list[Slot]:
        """The slots that hold something else in `later`, with the parts that differ, or did not
        exist before it."""
        slots = []
        for key, (slot, value) in later.values.items():
            if key not in self.values:
                slots.append(slot)
            elif not self._agrees(self.values[key][1], value, later):
                paths = differing(self.values[key][1], value, _equal)
                slots.append(replace(slot, paths=tuple(paths)))
        return slots

    def _agrees(self, value: Any, other: Any, later: Snapshot) -> bool:
        if id(value) in self.contents and value is other:
            before, after = self.contents[id(value)][1], later.contents[id(value)][1]
            if isinstance(before, np.ndarray):
                return bool(np.array_equal(before, after))
            if isinstance(before, set):
                return bool(before == after)
            keys = isinstance(before, dict)
            return list(before) == list(after) if keys else len(before) == len(after)
        return _equal(value, other)

    def counted(self, later: Snapshot) -> list[Slot]:
        """The slots that have another number, or a longer list, in `later`."""
        return [
            slot
            for key, (slot, value) in later.values.items()
            if key in self.values and self._counts(self.values[key][1], value, later)
        ]

    def _counts(self, value: Any, other: Any, later: Snapshot) -> bool:
        if isinstance(value, list | deque) and value is other and id(value) in self.contents:
            return len(self.contents[id(value)][1]) < len(later.contents[id(value)][1])
        return type(value) in (int, float) and type(other) is type(value) and value != other

    def new_parts(self, later: Snapshot) -> list[str]:
        """The paths of the parameters and submodules that did not exist before `later`."""
        return [
            f"{self.parts[key][1]}.{name}"
            for key, (_, _, names) in later.parts.items()
            if key in self.parts
            for name in sorted(names - self.parts[key][2])
        ]

    def restore(self, later: Snapshot) -> None:
        """Gives every slot that changed what it held here, and removes new parts."""
        for table, _, names in self.parts.values():
            for name in table.keys() - names:
                del table[name]
        for container, copy in self.contents.values():
            if not _holds(container, copy):
                _refill(container, copy)
        for key, (slot, value) in later.values.items():
            if key not in self.values and slot.kind in ("attribute", "global"):
                slot.put(MISSING)
            elif key in self.values and slot.kind != "item" and self.values[key][1] is not value:
                slot.put(self.values[key][1])
        for key, (slot, value) in self.values.items():
            if key not in later.values and slot.kind == "attribute":
                slot.put(value)


def _equal(value: Any, other: Any) -> bool:
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, tuple):
        return len(value) == len(other) and all(map(_equal, value, other))
    return isinstance(value, TEXTUAL) and repr(value) == repr(other)


def _holds(container: Any, copy: Any) -> bool:
    """Whether a container has the very elements of a copy of it."""
    if isinstance(container, np.ndarray):
        return bool(np.array_equal(container, copy))
    if len(container) != len(copy):
        return False
    if isinstance(container, dict):
        return all(key in container and container[key] is copy[key] for key in copy)
    if isinstance(container, set):
        return bool(container == copy)
    return all(map(operator.is_, container, copy))


def _refill(container: Any, copy: Any) -> None:
    if isinstance(container, np.ndarray):
        container[...] = copy
    elif isinstance(container, list):
        container[:] = copy
    elif isinstance(container, deque):
        container.clear()
        container.extend(copy)
    else:
        container.clear()
        container.update(copy)


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes that an object has itself, also where its class invents others."""
    try:
        held = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return held if isinstance(held, dict) else {}


def members_of(value: Any) -> dict[str, Any]:
    """The attributes that an object has by `__slots__` of its class."""
    members: dict[str, Any] = {}
    for kind in type(value).__mro__:
        for name, member in vars(kind).items():
            if isinstance(member, MemberDescriptorType):
                try:
                    members[name] = member.__get__(value)
                except AttributeError:  # it has none
                    continue
    return members


def _is_member(owner: Any, key: str) -> bool:
    return isinstance(getattr(type(owner), key, None), MemberDescriptorType)
