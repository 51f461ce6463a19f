"""The text of a symbolic size, such as f"{n}", is that of the example's number.

torch writes the symbol ("s77"), so that a comparison of texts, or their length, would decide what
is computed without a guard. Here the number is written, and the guard refuses other sizes with the
user's line. So it is where a size is rounded to tens. Texts that are printed, logged or raised
cannot change a result, and are left alone.
"""

from __future__ import annotations

import ast
import linecache
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any
from unittest import mock

import torch

from moec.capture.user_code.sources import is_internal, is_standard

_WRITERS = frozenset(
    "print debug info warning error exception critical log info_once record_function "
    "range_push".split()
)
_CHECKS = re.compile("check|assert|warn")  # torch._check, transformers' torch_compilable_check
_RECORDS = (logging.__file__, warnings.__file__, traceback.__file__)
"""The parts of the standard library whose texts are only read by people."""
_NUMBERS = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}


@contextmanager
def texts_guarded() -> Iterator[None]:
    """While open, texts of sizes are those of the example's numbers in the user's code."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.SymInt, "__round__", _rounded))
        for kind, number in _NUMBERS.items():
            text = _text(kind.__repr__, number)
            stack.enter_context(mock.patch.object(kind, "__repr__", text))
        yield


def _rounded(size: Any, digits: int | None = None) -> Any:
    """A size rounded to tens or hundreds is that of the example's number; torch rounds nothing."""
    return size if digits is None or digits >= 0 else round(int(size), digits)


def _text(symbol: Callable[[Any], str], number: Callable[[Any], Any]) -> Callable[[Any], str]:
    def __repr__(size: Any) -> str:
        return repr(number(size)) if _decides(sys._getframe(1)) else symbol(size)

    return __repr__


def _decides(frame: FrameType) -> bool:
    """Whether a text that is made in this frame may change a result. One that the standard library
    makes (`pprint.pformat(n)`) is that of the code that calls it."""
    caller: FrameType | None = frame
    while caller is not None and is_standard(caller.f_code.co_filename):
        caller = None if caller.f_code.co_filename in _RECORDS else caller.f_back
    if caller is None:
        return False
    file = caller.f_code.co_filename
    return not is_internal(file) and caller.f_lineno not in _written(file)


@lru_cache(maxsize=256)
def _written(file: str) -> frozenset[int]:
    """The lines of a file's statements that write or raise a text; none where its text is
    missing. A call whose value is used may decide by its text."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return frozenset()
    lines: set[int] = set()
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Raise):
            parts = [node]
        elif isinstance(node, ast.Assert) and node.msg is not None:
            parts = [node.msg]
        elif isinstance(node, ast.Expr) and _writes(node.value):
            parts = [node]
        elif isinstance(node, ast.withitem) and _writes(node.context_expr):
            parts = [node.context_expr]
        for part in parts:
            first, last = getattr(part, "lineno", 0), getattr(part, "end_lineno", 0)
            lines.update(range(first, last + 1))
    return frozenset(lines)


def _writes(value: ast.expr) -> bool:
    name = _name(value.func) if isinstance(value, ast.Call) else ""
    return name in _WRITERS or _CHECKS.search(name) is not None


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""
