"""Keeps sizes symbolic where user code calls int(), float() or len() on them.

Python requires int() to return an int, so int(n * 2.0 / 8) makes torch evaluate the size in the
example, record a guard (floor(n/4) == 6), and put the constant into the graph. Where a guard comes
from such a line, the module is exported again with replacements of these functions in the globals
of that file, and with a one_hot that accepts a symbolic number of classes (a capacity). min(),
max(), round() and the functions of math keep sizes symbolic without help.
"""

from __future__ import annotations

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
from moec.capture.shadows import CONVERSIONS, python_type

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
            names = {name: f for name, f in CONVERSIONS.items() if name not in vars(module)}
            stack.enter_context(mock.patch.dict(vars(module), names))
        if files:
            stack.enter_context(_Sized())
        yield


class _Sized(TorchFunctionMode):
    """Lets one_hot take a symbolic number of classes, and torch's functions int and float as
    dtypes."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args = tuple(map(python_type, args))
        named = {name: python_type(value) for name, value in (kwargs or {}).items()}
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

    A module may fail with the replaced functions. In that case the previous export is returned, and
    its guards are refused later, when they are settled.
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
