"""Where the Python values of a module live: what its code can keep between calls.

They are the attributes and buffers of its submodules, the attributes of its classes, the elements
of containers and objects in them, and the globals and closures that its methods and functions name.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch.nn.modules.lazy import LazyModuleMixin

from moec.capture.python_values.slots import TEXTUAL, Slot, Snapshot, attributes_of, members_of
from moec.capture.user_code.sources import is_internal, is_standard, package_of, packages_of

_OF_TORCH = frozenset(vars(torch.nn.Module()))
_TABLES = {"_buffers", "_non_persistent_buffers_set"} | {
    name for name in _OF_TORCH if name.endswith("_hooks")
}
"""Tables of torch that go back. A first call of transformers' models adds hooks and sets an
attribute that says so; both go back together, or the next call would add them twice."""
_PARTS = ("_parameters", "_modules")
"""Parameters and submodules that are there stay as a forward leaves them, since modules are cast
and filled; new ones go."""
_LIBRARIES = {"numpy", "transformers"}
"""The code of transformers keeps values in its modules' attributes, if anywhere. To search what all
its functions name takes half a second."""
_TYPES_OF_PYTHON = ("types", "argparse", "collections", "weakref")
_CONTAINERS = (list, deque, set, dict, defaultdict, OrderedDict, Counter, np.ndarray)


@contextmanager
def values_kept(module: torch.nn.Module) -> Iterator[None]:
    """On leaving, the Python values, buffers and hooks of `module` are those of entering."""
    before = snapshot(module)
    try:
        yield
    finally:
        before.restore(snapshot(module))


def snapshot(module: torch.nn.Module) -> Snapshot:
    """What all slots that the code of `module` can reach hold now."""
    # What other packages keep in globals and classes (registries, caches) is theirs.
    packages = {"", *packages_of(module)} - _LIBRARIES
    walk = _Walk(Snapshot(), packages)
    for name, part in module.named_modules():
        walk.part(part, f"self.{name}" if name else "self")
    return walk.snapshot


@dataclass
class _Walk:
    snapshot: Snapshot
    packages: set[str]
    visited: dict[int, Any] = field(default_factory=dict)

    def part(self, part: torch.nn.Module, path: str) -> None:
        if self._visit(part) or isinstance(part, LazyModuleMixin):
            return
        for key, value in list(vars(part).items()):
            if key not in _OF_TORCH:
                self.slot(part, key, "attribute", f"{path}.{key}", value)
            elif key in _TABLES:
                self.snapshot.contents[id(value)] = (value, value.copy())
            elif key in _PARTS:
                self.snapshot.parts[id(value)] = (value, path, frozenset(value))
        for kind in type(part).__mro__:
            self.type(kind)

    def slot(self, owner: Any, key: Any, kind: str, words: str, value: Any) -> None:
        self.snapshot.values[id(owner), key] = (Slot(owner, key, kind, words), value)
        self.value(value, words)

    def value(self, value: Any, words: str) -> None:
        if type(value) is not value.__class__ or isinstance(value, TEXTUAL):
            return  # a value in place of another shows nothing of it
        if isinstance(value, FunctionType):
            self.function(value)
        elif isinstance(value, type):
            self.type(value)
        elif isinstance(value, torch.nn.Module):
            self.part(value, words)
        elif isinstance(value, torch.Tensor) or self._visit(value):
            return
        elif isinstance(value, tuple):
            for index, held in enumerate(value):
                self.value(held, f"{words}[{index}]")
        elif isinstance(value, MethodType):
            self.value(value.__func__, words)
            self.value(value.__self__, words)
        elif isinstance(value, weakref.ref):
            self.value(value(), words)
        elif isinstance(value, functools.partial):
            self.value((value.func, *value.args, *value.keywords.values()), words)
        elif is_cached(value):
            self.value(value.__wrapped__, words)
        else:
            self._object(value, words)

    def _object(self, value: Any, words: str) -> None:
        users = _holds_values(type(value))
        if type(value) in _CONTAINERS or (users and isinstance(value, _CONTAINERS)):
            self._container(value, words)
        if users or type(value).__module__ in _TYPES_OF_PYTHON:
            for key, held in {
                **attributes_of(value),
                **(members_of(value) if users else {}),
            }.items():
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
        if self._visit(kind) or not self._is_users(_file(kind)):
            return
        for key, value in list(vars(kind).items()):
            function = value.__func__ if isinstance(value, staticmethod) else value
            if is_cached(function):
                self.slot(kind, key, "attribute", f"{kind.__name__}.{key}", value)
                self.value(function, key)
                continue
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
        if self._visit(function) or not self._is_users(code.co_filename):
            return
        defaults = (function.__defaults__ or (), function.__kwdefaults__ or {})
        self.value(defaults[0], f"a default of {function.__name__}()")
        self.value(tuple(defaults[1].values()), f"a default of {function.__name__}()")
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
        if self._is_users(getattr(module, "__file__", None) or "<"):
            for name in sorted(names & set(vars(module))):
                held = vars(module)[name]
                if not isinstance(held, ModuleType):
                    words = f"{module.__name__}.{name}"
                    self.slot(vars(module), name, "global", words, held)

    def _is_users(self, file: str) -> bool:
        return not (is_internal(file) or is_standard(file)) and package_of(file) in self.packages

    def _visit(self, value: Any) -> bool:
        """Whether the value was visited before. Visited values stay alive, so ids are unique."""
        before = id(value) in self.visited
        self.visited[id(value)] = value
        return before


_CACHED = type(functools.lru_cache(lambda: None))


def is_cached(value: Any) -> bool:
    """Whether a function has an lru_cache."""
    return type(value) is _CACHED


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_slot(value: Any) -> bool:
    return inspect.isdatadescriptor(value) or inspect.ismethoddescriptor(value)


def _holds_values(kind: type) -> bool:
    """Whether a class is neither torch's, numpy's, transformers' nor of the standard library."""
    file = _file(kind)
    return not (is_internal(file) or is_standard(file) or package_of(file) in _LIBRARIES)


def _file(kind: type) -> str:
    """The file of a class; "" in the main program, "<" for a builtin class."""
    if kind.__module__ == "__main__":
        return ""
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or "<"
