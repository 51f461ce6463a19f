"""Python's isinstance(), type() and divmod() on symbolic sizes, as on numbers.

While a module is traced, a size is a torch.SymInt, which is no int: without help, a test of its
type would take the branch for other types, and the graph would be that of another model.
"""

from __future__ import annotations

import builtins
import linecache
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from moec.capture.speculate.sites import foreign
from moec.capture.speculate.user_globals import user_globals
from moec.capture.user_code.shadows import shadowed

_CALLS = re.compile(r"\b(isinstance|type|divmod)\s*\(")
_PLAIN: Mapping[type, Any] = {torch.SymInt: 0, torch.SymFloat: 0.0}
LIBRARIES = ("torch", "numpy", "sympy", "transformers")


@contextmanager
def sizes_as_numbers(module: torch.nn.Module) -> Iterator[None]:
    """While open, isinstance(), type() and divmod() in the user's code of `module` take a symbolic
    size for an int, and a symbolic float for a float."""
    others = foreign(name for name in LIBRARIES if name in sys.modules)
    with ExitStack() as stack:
        for names in user_globals(module, others):
            if _uses_types(names.get("__file__")):
                stack.enter_context(mock.patch.dict(names, shadowed(names, _SHADOWS)))
        yield


def _uses_types(file: Any) -> bool:
    """Whether the code of a file calls one of the functions; True if its text is missing."""
    lines = linecache.getlines(file) if isinstance(file, str) else []
    return not lines or any(map(_CALLS.search, lines))


def _isinstance(value: Any, classes: Any) -> bool:
    if isinstance(value, classes):
        return True
    plain = _PLAIN.get(builtins.type(value))
    return plain is not None and isinstance(plain, classes)


def _divmod(a: Any, b: Any) -> Any:
    symbolic = isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt)
    return (a // b, a % b) if symbolic else builtins.divmod(a, b)


class _TypeOf(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, builtins.type)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1:
            return builtins.type(*args, **kwargs)
        kind = builtins.type(args[0])
        plain = builtins.type(_PLAIN.get(kind, args[0]))
        # The caller's int may be a replacement too (shadows.py), and `is` compares with that.
        replaced = sys._getframe(1).f_globals.get(plain.__name__)
        return replaced if plain in (int, float) and replaced else plain


class _Type(type, metaclass=_TypeOf):
    """Replaces type."""


_SHADOWS: Mapping[str, Any] = {"isinstance": _isinstance, "type": _Type, "divmod": _divmod}
