"""Where the Python values of a module live: what its code can keep between calls.

They are the attributes of its submodules, the attributes of its classes, the elements of containers
and objects in them, and the globals and closures that its methods and functions name. Values in
other places (`__slots__`, weak references, partial functions, defaults) are not found.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch.nn.modules.lazy import LazyModuleMixin

from moec.capture.state.snapshot import CONSTANTS, ELEMENTS, Slot, Snapshot
from moec.capture.user_code.sources import is_internal, is_standard, package_of, packages_of
from moec.torch_private import PRIVATE

_OF_TORCH = frozenset(vars(torch.nn.Module()))
_TABLES = {PRIVATE["buffers_of"].attribute, PRIVATE["passing_buffers_of"].attribute} | {
    name for name in _OF_TORCH if name.endswith("_hooks")
}
"""Tables of torch that go back. A first call of transformers' models adds hooks and sets an
attribute that says so; both go back together, or the next call would add them twice."""
_PARTS = (PRIVATE["parameters_of"].attribute, PRIVATE["children_of"].attribute)
"""Parameters and submodules that are there stay as a forward leaves them, since modules are cast
and filled; new ones go."""
_LIBRARIES = {"numpy", "transformers"}
"""The code of transformers keeps values in its modules' attributes, if anywhere. To search what all
its functions name takes half a second."""
_NAMESPACES = ("types", "argparse")
_CONTAINERS = (list, deque, set, dict, defaultdict, OrderedDict, Counter, np.ndarray)
_CACHED = type(functools.lru_cache(lambda: None))


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
    walk = _Walk(Snapshot(), users_packages(module))
    for name, part in module.named_modules():
        walk.part(part, f"self.{name}" if name else "self")
    return walk.snapshot


def users_packages(module: torch.nn.Module) -> frozenset[str]:
    """The packages of the user's code; "" for files outside of packages. What other packages keep
    in globals and classes (registries, caches) is theirs."""
    return frozenset({"", *packages_of(module)} - _LIBRARIES)


def is_users(file: str, packages: frozenset[str]) -> bool:
    return not (is_internal(file) or is_standard(file)) and package_of(file) in packages


def names_of(code: CodeType) -> Iterator[str]:
    """The names of attributes and globals in a function and the functions in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_of(constant)


def function_of(value: Any) -> Any:
    """The function in a method, a property or a function with an lru_cache; others as they are."""
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    elif isinstance(value, functools.cached_property):
        value = value.func
    return inspect.unwrap(value) if isinstance(value, FunctionType | _CACHED) else value


def cells_of(function: FunctionType) -> Iterator[tuple[str, CellType]]:
    """The cells of a function's closure that are filled, with their names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__" and cell != CellType():
            yield name, cell


@dataclass
class _Walk:
    snapshot: Snapshot
    packages: frozenset[str]
    visited: dict[int, Any] = field(default_factory=dict)

    def part(self, part: torch.nn.Module, path: str) -> None:
        if self._visit(part) or isinstance(part, LazyModuleMixin):
            return
        table = self._owner(vars(part))
        for key, value in list(table.items()):
            if key not in _OF_TORCH:
                self.slot(table, key, f"{path}.{key}", f".{key}", value)
            elif key in _TABLES:
                self.elements(value, "", "")
            elif key in _PARTS:
                self.snapshot.parts[id(value)] = (value, path, frozenset(value))
        for kind in type(part).__mro__:
            self.type(kind)

    def slot(self, owner: Any, key: Any, words: str, name: str, value: Any) -> None:
        self.snapshot.values[id(owner), key] = (Slot(owner, key, words, name), value)
        self.value(value, words, name)

    def value(self, value: Any, words: str, name: str) -> None:
        if isinstance(value, CONSTANTS):
            return
        function = function_of(value)
        if isinstance(function, FunctionType):
            self.function(function)
        elif isinstance(value, type):
            self.type(value)
        elif isinstance(value, torch.nn.Module):
            self.part(value, words)
        elif isinstance(value, torch.Tensor) or self._visit(value):
            return
        else:
            self._object(value, words, name)

    def elements(self, container: Any, words: str, name: str) -> None:
        slot = Slot(container, ELEMENTS, words, name)
        self.snapshot.values[slot.place] = (slot, container.copy())

    def _object(self, value: Any, words: str, name: str) -> None:
        users = _holds_values(type(value))
        if type(value) in _CONTAINERS or (users and isinstance(value, _CONTAINERS)):
            self.elements(value, words, name)
        if isinstance(value, dict | list | deque | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, element in list(items):
                self.value(element, f"{words}[{key!r}]", name)
        if users or type(value).__module__ in _NAMESPACES:
            table = self._owner(attributes_of(value))
            for key, held in list(table.items()):
                self.slot(table, key, f"{words}.{key}", f".{key}", held)
            for kind in type(value).__mro__:
                self.type(kind)

    def type(self, kind: type) -> None:
        """The plain attributes of a user's class, and what its methods name."""
        if self._visit(kind) or not is_users(_file(kind), self.packages):
            return
        for key, value in list(vars(self._owner(kind)).items()):
            function = function_of(value)
            if isinstance(function, FunctionType):
                self.function(function)
            elif not (key.startswith("__") or inspect.isroutine(value) or _is_member(value)):
                self.slot(kind, key, f"{kind.__name__}.{key}", f".{key}", value)

    def function(self, function: FunctionType) -> None:
        """The globals and the cells of the closure that a user's function names."""
        code = function.__code__
        if self._visit(function) or not is_users(code.co_filename, self.packages):
            return
        names = {name for name in names_of(code) if name.isidentifier()}  # not @pytest_ar
        self._globals(function.__globals__, names, "the global ", "")
        for name, cell in cells_of(function):
            self.slot(cell, 0, name, name, cell.cell_contents)

    def _globals(self, table: dict[str, Any], names: set[str], words: str, dot: str) -> None:
        """The globals of these names; with an empty `dot`, also those of modules among them."""
        for name in sorted(names & set(self._owner(table))):
            value = table[name]
            if not isinstance(value, ModuleType):
                self.slot(table, name, f"{words}{name}", f"{dot}{name}", value)
            elif not dot and is_users(getattr(value, "__file__", None) or "<", self.packages):
                self._globals(vars(value), names, f"{value.__name__}.", ".")

    def _owner(self, owner: Any) -> Any:
        self.snapshot.owners[id(owner)] = owner
        return owner

    def _visit(self, value: Any) -> bool:
        """Whether the value was visited before. Visited values stay alive, so ids are unique."""
        before = id(value) in self.visited
        self.visited[id(value)] = value
        return before


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes that an object has itself, also where its class invents others."""
    try:
        table = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return table if isinstance(table, dict) else {}


def _is_member(value: Any) -> bool:
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
