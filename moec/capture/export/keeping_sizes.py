"""Keeps sizes symbolic where user code calls int(), float() or len() on them.

Python requires int() to return an int, so int(n * 2.0 / 8) makes torch evaluate the size in the
example, record a guard (floor(n/4) == 6), and put the constant into the graph. Where a guard comes
from such a line, the module is exported again with substitutes of these functions in that file,
and with a one_hot that accepts a symbolic number of classes (a capacity). The same is done for
min() and max() of floats. Those of integers, round(), math.floor and ceil need no help.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from moec.capture.intercept.substitutes import CONVERSIONS, SHADOWS, python_type
from moec.capture.sizes.guards import Guard, raw_guards

Files = Mapping[str, Mapping[str, Any]]
"""By file, the substitutes of builtins there."""

_ASKS = re.compile(r"\b(int|float|len|one_hot)\b")
_CHOOSES = re.compile(r"\b(min|max)\s*\(")
_FLOATS = frozenset({"IntTrueDiv", "FloatTrueDiv", "ToFloat", "FloatPow"})


def export_keeping_sizes(export: Callable[[Files], ExportedProgram]) -> ExportedProgram:
    """The result of `export`, repeated while lines that convert a size to a number, or choose among
    floats of sizes, cause guards.

    A module may fail with the substitutes. In that case the previous export is returned, and its
    guards are refused later, when they are settled.
    """
    files: Files = {}
    exported = export(files)
    while True:
        more = _substitutes(raw_guards(exported), files)
        if more == files:
            return exported
        files = more
        try:
            with _Sized():
                exported = export(files)
        except Exception:  # whatever the module raises
            return exported


def _substitutes(guards: Iterable[Guard], files: Files) -> Files:
    """Those of `files`, and those of the lines that `guards` come from."""
    functions = dict(files)
    for guard in guards:
        if guard.file and _chooses_float(guard):
            functions[guard.file] = SHADOWS
        elif guard.file and isinstance(guard.condition, sympy.Eq) and _converts(guard.text):
            functions.setdefault(guard.file, CONVERSIONS)
    return functions


def _converts(line: str) -> bool:
    """Whether a line of code may convert a size to a number; True if its text is missing."""
    return not line or _ASKS.search(line) is not None


def _chooses_float(guard: Guard) -> bool:
    """Whether a guard comes from min() or max() of a float. That of integers is a branch that
    chooses a size, which is exported on both sides."""
    kinds = {type(part).__name__ for part in guard.condition.atoms(sympy.Function)}
    return bool(kinds & _FLOATS) and _CHOOSES.search(guard.text) is not None


class _Sized(TorchFunctionMode):
    """Lets one_hot take a symbolic number of classes, and torch's functions the substitutes of int
    and float as dtypes."""

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
