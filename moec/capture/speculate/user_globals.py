"""Where the code of a module looks up names: the globals of the user's Python modules."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch

from moec.capture.speculate.sites import Foreign

_TOOLS = frozenset({"moec", "pytest", "_pytest", "hypothesis"})
"""Packages that a user's file may import but whose code is not part of a model."""


def user_globals(module: torch.nn.Module, foreign: Foreign) -> Iterator[dict[str, Any]]:
    """The globals of all modules in which the code of `module` may look up names: those of its
    classes, of values in their attributes, and of functions and classes that these import."""
    classes = {base.__module__ for part in module.modules() for base in type(part).__mro__}
    held = [value for part in module.modules() for value in vars(part).values()]
    classes |= {v.__module__ if isinstance(v, FunctionType) else type(v).__module__ for v in held}
    pending, visited = sorted(classes - {"builtins"}), set[str]()
    while pending:
        name = pending.pop()
        source = sys.modules.get(name)
        if name in visited or source is None:
            continue
        if not _users(source, foreign, name in classes):
            continue
        visited.add(name)
        yield vars(source)
        for value in list(vars(source).values()):
            value = inspect.unwrap(value) if isinstance(value, FunctionType) else value
            if isinstance(value, FunctionType | type):
                pending.append(value.__module__)
            elif isinstance(value, ModuleType) and _near(value.__name__, name):
                pending.append(value.__name__)


def _users(source: ModuleType, foreign: Foreign, held: bool) -> bool:
    file, package = getattr(source, "__file__", None), source.__name__.split(".")[0]
    if package in sys.stdlib_module_names - {"__main__"} or (package in _TOOLS and not held):
        return False
    return source.__name__ == "__main__" or not str(file).startswith(foreign.prefixes)


def _near(name: str, other: str) -> bool:
    return name.split(".")[0] == other.split(".")[0]
