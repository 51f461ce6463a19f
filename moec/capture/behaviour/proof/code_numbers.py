"""The numbers that the code of a module names: lengths at which it may compute something else.

A module is compared with its description at some lengths. Its code may treat others apart, as in
`0.5 if len(x) > self.most else 1.0`. The threshold of such a condition is nearly always a constant
of the code, a local variable, or an attribute, and these can be read.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import Any

from torch import nn

from moec.capture.behaviour.failure import is_library


def numbers_of_code(module: nn.Module, run: Callable[[], object]) -> tuple[int, ...]:
    """The numbers that the code of `module` names in one run, those of its text first: constants,
    locals and globals of the functions that are called, and attributes of the modules."""
    code: dict[CodeType, None] = {}
    named: dict[int, None] = {}

    def record(frame: FrameType, event: str, _: Any) -> None:
        if event == "return" and not is_library(frame.f_code.co_filename):
            code[frame.f_code] = None
            values = [*frame.f_locals.values(), *map(frame.f_globals.get, frame.f_code.co_names)]
            named.update(dict.fromkeys(_numbers(values)))

    previous = sys.getprofile()
    sys.setprofile(record)
    try:
        run()
    finally:
        sys.setprofile(previous)
    written = dict.fromkeys(n for each in code for n in _numbers(_constants(each)))
    attributes = dict.fromkeys(n for part in module.modules() for n in _numbers(_attributes(part)))
    return tuple(written | dict.fromkeys(sorted(named)) | dict.fromkeys(sorted(attributes)))


def _constants(code: CodeType) -> Iterator[Any]:
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _constants(value)
        else:
            yield value


def _attributes(part: nn.Module) -> Iterator[Any]:
    """The values of a module's attributes, of those of its class, and of its configurations."""
    owners = [vars(part), *(vars(base) for base in type(part).__mro__ if _is_users(base))]
    for owner in owners:
        for value in owner.values():
            yield value
            fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
            if not isinstance(value, nn.Module | type):
                yield from fields.values()


def _is_users(kind: type) -> bool:
    return kind.__module__.split(".")[0] not in ("builtins", "torch")


def _numbers(values: Iterable[Any]) -> Iterator[int]:
    """The whole numbers, above 1, nearest to the numbers among values and in their tuples."""
    for value in values:
        if isinstance(value, tuple | frozenset | list) and len(value) < 64:
            yield from _numbers(value)
        elif type(value) in (int, float) and math.isfinite(value) and 1 < value < 2**31:
            yield int(value)
