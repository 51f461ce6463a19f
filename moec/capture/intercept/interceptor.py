"""Replaces functions while a module is traced: one table, and one pass over the user's names.

    Handler(math, "sqrt", of_size)       math.sqrt, and each name under which the user imported it
    Handler(builtins, "int", Integer)    `int` in the user's files, and nowhere else
    Handler(SymInt, "__round__", ...)    a method

Functions of the user's with an lru_cache are called without it: the tensors of a trace have no
data, and the cache would give them to later calls.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

import torch

from moec.capture.user_code.sites import Foreign, foreign

_TOOLS = frozenset({"moec", "pytest", "_pytest", "hypothesis"})
"""Packages that a user's file may import but whose code is not part of a model."""
_LIBRARIES = ("torch", "numpy", "sympy", "transformers")
_CACHED = type(functools.lru_cache(len))


@dataclass(frozen=True)
class Handler:
    """`function` in the place of `owner.name`."""

    owner: Any
    name: str
    function: Any


@contextmanager
def intercepted(
    module: torch.nn.Module,
    handlers: Iterable[Handler],
    others: Foreign | None = None,
    files: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[None]:
    """While open, the code of `module` calls the handlers. `others` are the files that hold no user
    code; `files` has further functions in the place of builtins, by file. For one thread at a
    time."""
    others = others or foreign(name for name in _LIBRARIES if name in sys.modules)
    files = files or {}
    everywhere: dict[str, Any] = {}
    aliases: dict[int, Any] = {}
    with ExitStack() as stack:
        for handler in tuple(handlers):
            if handler.owner is builtins:
                everywhere[handler.name] = handler.function
                continue
            if isinstance(handler.owner, ModuleType):
                aliases[id(getattr(handler.owner, handler.name))] = handler.function
            stack.enter_context(mock.patch.object(handler.owner, handler.name, handler.function))
        for names in _namespaces(module, others, files):
            shadows = {**everywhere, **files.get(names.get("__file__") or "", {})}
            replaced = {name: shadows[name] for name in shadows.keys() - names.keys()}
            replaced |= {n: aliases[id(v)] for n, v in names.items() if id(v) in aliases}
            stack.enter_context(mock.patch.dict(names, replaced | _uncached(names)))
        for kind in {base for part in module.modules() for base in type(part).__mro__}:
            for name, function in _uncached(vars(kind)).items():
                stack.enter_context(mock.patch.object(kind, name, function))
        yield


def _uncached(names: Mapping[str, Any]) -> dict[str, Any]:
    """The functions with an lru_cache among `names`, each with a cache of this trace."""
    return {
        name: _with_sizes(value)
        for name, value in list(names.items())
        if isinstance(value, _CACHED)
    }


def _with_sizes(cached: Any) -> Any:
    function, in_trace = cached.__wrapped__, functools.cache(cached.__wrapped__)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        numbers = (*args, *kwargs.values())
        symbolic = any(isinstance(n, torch.SymInt | torch.SymFloat) for n in numbers)
        return function(*args, **kwargs) if symbolic else in_trace(*args, **kwargs)

    return call


def _namespaces(
    module: torch.nn.Module, others: Foreign, files: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The globals of the user's code, and of `files`, each once."""
    spaces = {id(names): names for names in user_globals(module, others)}
    for source in list(sys.modules.values()) if files else ():
        if (getattr(source, "__file__", None) or "") in files:
            spaces[id(vars(source))] = vars(source)
    yield from spaces.values()


def user_globals(module: torch.nn.Module, others: Foreign) -> Iterator[dict[str, Any]]:
    """The globals of all modules in which the code of `module` may look up names: those of its
    classes, of values in their attributes, and of functions and classes that these import."""
    classes = {base.__module__ for part in module.modules() for base in type(part).__mro__}
    held = [value for part in module.modules() for value in vars(part).values()]
    classes |= {v.__module__ if isinstance(v, FunctionType) else type(v).__module__ for v in held}
    # A class that was made by hand may have None.
    pending = sorted(name for name in classes if name not in (None, "builtins"))
    visited = set[str]()
    while pending:
        name = pending.pop()
        source = sys.modules.get(name)
        if name in visited or source is None:
            continue
        if not _users(source, others, name in classes):
            continue
        visited.add(name)
        yield vars(source)
        for value in list(vars(source).values()):
            value = inspect.unwrap(value) if isinstance(value, FunctionType) else value
            if isinstance(value, FunctionType | type):
                pending.append(value.__module__)
            elif isinstance(value, ModuleType) and _near(value.__name__, name):
                pending.append(value.__name__)


def _users(source: ModuleType, others: Foreign, held: bool) -> bool:
    file, package = getattr(source, "__file__", None), source.__name__.split(".")[0]
    if package in sys.stdlib_module_names - {"__main__"} or (package in _TOOLS and not held):
        return False
    return source.__name__ == "__main__" or not str(file).startswith(others.prefixes)


def _near(name: str, other: str) -> bool:
    return name.split(".")[0] == other.split(".")[0]
