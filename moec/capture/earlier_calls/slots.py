"""The places outside tensors where the code of a module can keep values between calls.

They are the attributes of its submodules and classes, the elements of containers and objects in
them, and the globals and closures that its methods and functions name.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from moec.capture.calls.attributes import HOOKS
from moec.capture.earlier_calls.earlier_value import EarlierValue
from moec.capture.user_code.sources import is_internal, is_standard

_OF_TORCH = frozenset(vars(torch.nn.Module()))
_TEXTUAL = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, range)
_NUMPY = str(Path(np.__file__ or "").parent)
_TRANSFORMERS = "site-packages/transformers/"
"""The code of transformers keeps values in its modules' attributes, if anywhere. To search what all
its functions name takes half a second."""
_TYPES_OF_PYTHON = ("types", "argparse", "collections")
_CONTAINERS = (list, deque, set, dict, defaultdict, OrderedDict, Counter, np.ndarray)
MISSING = object()


@dataclass(frozen=True)
class Slot:
    """One place: `kind` is "attribute", "item" (of a container), "global" or "cell". `words` names
    it for a message."""

    owner: Any
    key: Any
    kind: str
    words: str

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
        else:
            _attributes(self.owner)[self.key] = value

    def _remove(self) -> None:
        if isinstance(self.owner, type):
            delattr(self.owner, self.key)
        elif self.kind == "global":
            self.owner.pop(self.key, None)
        else:
            _attributes(self.owner).pop(self.key, None)


@dataclass
class Snapshot:
    """What all slots hold, by owner and key, and copies of the containers' elements.

    `values` has (slot, value); containers are compared by their copies.
    """

    values: dict[tuple[int, Any], tuple[Slot, Any]] = field(default_factory=dict)
    contents: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def changed(self, later: Snapshot) -> list[Slot]:
        """The slots that hold something else in `later`, or did not exist before it."""
        return [
            slot
            for key, (slot, value) in later.values.items()
            if key not in self.values or not self._agrees(self.values[key][1], value, later)
        ]

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

    def restore(self, later: Snapshot) -> None:
        """Gives every slot that changed what it held here."""
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
    return isinstance(value, _TEXTUAL) and repr(value) == repr(other)


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


def snapshot(module: torch.nn.Module) -> Snapshot:
    """What all slots that the code of `module` can reach hold now."""
    walk = _Walk(Snapshot())
    for name, part in module.named_modules():
        path = f"self.{name}" if name else "self"
        for key, value in list(vars(part).items()):
            if key not in _OF_TORCH:
                walk.slot(part, key, "attribute", f"{path}.{key}", value)
            elif key in HOOKS:
                walk.snapshot.contents[id(value)] = (value, value.copy())
        for kind in type(part).__mro__:
            walk.type(kind)
    return walk.snapshot


@dataclass
class _Walk:
    snapshot: Snapshot
    visited: dict[int, Any] = field(default_factory=dict)

    def slot(self, owner: Any, key: Any, kind: str, words: str, value: Any) -> None:
        self.snapshot.values[id(owner), key] = (Slot(owner, key, kind, words), value)
        self.value(value, words)

    def value(self, value: Any, words: str) -> None:
        if type(value) is EarlierValue or isinstance(value, _TEXTUAL):
            return
        if isinstance(value, FunctionType):
            self.function(value)
        elif isinstance(value, type):
            self.type(value)
        elif isinstance(value, torch.Tensor | torch.nn.Module) or self._visit(value):
            return
        elif type(value) in _CONTAINERS:
            self._container(value, words)
        elif isinstance(value, MethodType):
            self.value(value.__func__, words)
            self.value(value.__self__, words)
        elif _of_user(type(value)) or type(value).__module__ in _TYPES_OF_PYTHON:
            for key, held in list(_attributes(value).items()):
                self.slot(value, key, "attribute", f"{words}.{key}", held)
            for kind in type(value).__mro__:
                self.type(kind)

    def _container(self, value: Any, words: str) -> None:
        self.snapshot.contents[id(value)] = (value, value.copy())
        if isinstance(value, dict):
            for key, held in list(value.items()):
                self.slot(value, key, "item", f"{words}[{key!r}]", held)
        elif isinstance(value, list | deque):
            for index, held in enumerate(list(value)):
                self.slot(value, index, "item", f"{words}[{index}]", held)

    def type(self, kind: type) -> None:
        """The plain attributes of a user's class, and what its methods name."""
        if self._visit(kind) or not _of_user(kind):
            return
        for key, value in list(vars(kind).items()):
            value = inspect.unwrap(value) if callable(value) else value
            if isinstance(value, staticmethod | classmethod):
                value = value.__func__
            elif isinstance(value, property):
                value = value.fget
            if isinstance(value, FunctionType):
                self.function(value)
            elif not (key.startswith("__") or inspect.isroutine(value) or _is_slot(value)):
                self.slot(kind, key, "attribute", f"{kind.__name__}.{key}", value)

    def function(self, function: FunctionType) -> None:
        """The globals and the cells of the closure that a user's function names."""
        code = function.__code__
        if self._visit(function) or not _users_file(code.co_filename):
            return
        names = {name for name in _names(code) if name.isidentifier()}  # not @pytest_ar
        for name in sorted(names & set(function.__globals__)):
            held = function.__globals__[name]
            if isinstance(held, ModuleType):
                self._module(held, names)
            else:
                self.slot(function.__globals__, name, "global", f"the global {name}", held)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if isinstance(cell, CellType) and name != "__class__":
                try:
                    self.slot(cell, 0, "cell", name, cell.cell_contents)
                except ValueError:  # an empty cell
                    continue

    def _module(self, module: ModuleType, names: set[str]) -> None:
        if _users_file(getattr(module, "__file__", None) or "<"):
            for name in sorted(names & set(vars(module))):
                held = vars(module)[name]
                if not isinstance(held, ModuleType):
                    words = f"{module.__name__}.{name}"
                    self.slot(vars(module), name, "global", words, held)

    def _visit(self, value: Any) -> bool:
        """Whether the value was visited before. Visited values stay alive, so ids are unique."""
        before = id(value) in self.visited
        self.visited[id(value)] = value
        return before


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes that an object has itself, also where its class invents others."""
    try:
        held = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return held if isinstance(held, dict) else {}


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_slot(value: Any) -> bool:
    return inspect.isdatadescriptor(value) or inspect.ismethoddescriptor(value)


def _users_file(file: str) -> bool:
    library = is_internal(file) or is_standard(file) or file.startswith(_NUMPY)
    return not library and _TRANSFORMERS not in file


def _of_user(kind: type) -> bool:
    """Whether a class is neither torch's, numpy's nor of the standard library."""
    source = sys.modules.get(kind.__module__)
    if kind.__module__ == "__main__":
        return True
    return source is not None and _users_file(getattr(source, "__file__", None) or "<")
