"""Keeps sizes symbolic where user code calls int(), float() or len() on them.

Python requires int() to return an int, so int(n * 2.0 / 8) makes torch evaluate the size in the
example, record a guard (floor(n/4) == 6), and put the constant into the graph. Where a guard comes
from such a line, the module is exported again with replacements of these functions in the globals
of that file, and with a one_hot that accepts a symbolic number of classes (a capacity). min(),
max(), round() and the functions of math keep sizes symbolic without help.
"""

from __future__ import annotations

import builtins
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import sympy
import torch
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from moec.capture.guards import raw_guards

_ASKS = re.compile(r"\b(int|float|len|one_hot)\b")


def asks(line: str) -> bool:
    """Whether a line of code may convert a size to a number; True if its text is missing."""
    return not line or _ASKS.search(line) is not None


@contextmanager
def sizes_kept(files: Collection[str]) -> Iterator[None]:
    """While open, int(), float() and len() in the modules of these files leave sizes symbolic."""
    modules = [m for m in list(sys.modules.values()) if getattr(m, "__file__", None) in files]
    with ExitStack() as stack:
        for module in modules:
            names = {name: f for name, f in SHADOWS.items() if name not in vars(module)}
            stack.enter_context(mock.patch.dict(vars(module), names))
        if files:
            stack.enter_context(_Sized())
        yield


_sym_int: Callable[[Any], Any] = torch.sym_int
_sym_float: Callable[[Any], Any] = torch.sym_float


def _is_symbolic(x: Any) -> bool:
    return isinstance(x, torch.SymInt | torch.SymFloat)


class _WholeType(type):
    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, builtins.int | torch.SymInt)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, builtins.int | torch.SymInt)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and _is_symbolic(args[0]):
            size = args[0]
            return size if isinstance(size, torch.SymInt) else _sym_int(size)
        return builtins.int(*args, **kwargs)


class _Whole(builtins.int, metaclass=_WholeType):
    """Replaces int: symbolic integers are instances of it, and are returned unchanged."""


class _RealType(type):
    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, builtins.float | torch.SymFloat)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, builtins.float | torch.SymFloat)

    def __call__(cls, *args: Any) -> Any:
        if len(args) == 1 and _is_symbolic(args[0]):
            return _sym_float(args[0])
        return builtins.float(*args)


class _Real(builtins.float, metaclass=_RealType):
    """Replaces float: symbolic floats are instances of it."""


def _length(x: Any) -> Any:
    return x.shape[0] if isinstance(x, torch.Tensor) and x.ndim else builtins.len(x)


SHADOWS: Mapping[str, Any] = {"int": _Whole, "float": _Real, "len": _length}


class _Sized(TorchFunctionMode):
    """Lets one_hot take a symbolic number of classes."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func is torch.nn.functional.one_hot:
            ids, count = _one_hot(*args, **named)
            if not isinstance(count, int):
                classes = torch.arange(count, dtype=torch.int64)  # as torch decomposes one_hot
                return (ids.unsqueeze(-1) == classes).to(torch.int64)
        return func(*args, **named)


def _one_hot(tensor: torch.Tensor, num_classes: Any = -1) -> tuple[torch.Tensor, Any]:
    return tensor, num_classes


def export_keeping_sizes(export: Callable[[], ExportedProgram]) -> ExportedProgram:
    """The result of `export`, repeated while lines that convert a size to a number cause guards.

    A module may fail with the replaced functions (dtype=int is no dtype then). In that case the
    previous export is returned, and its guards are refused later, when they are settled.
    """
    files: set[str] = set()
    exported = export()
    while True:
        asking = {
            guard.file
            for guard in raw_guards(exported)
            if isinstance(guard.condition, sympy.Eq) and guard.file and asks(guard.text)
        }
        if asking <= files:
            return exported
        files |= asking
        try:
            with sizes_kept(files):
                exported = export()
        except Exception:  # whatever the module raises
            return exported
