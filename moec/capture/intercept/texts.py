"""The text of a symbolic size, such as f"{n}", is that of the example's number.

torch writes the symbol ("s77"), so that a comparison of texts, or their length, would decide what
is computed without a guard. Here the number is written, and the guard refuses other sizes with the
user's line. Texts that are printed, logged or raised cannot change a result, and are left alone.
"""

from __future__ import annotations

import ast
import linecache
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import lru_cache
from types import FrameType
from typing import Any

import torch

from moec.capture.user_code.sources import is_internal, is_standard

_WRITERS = re.compile(
    r"(.*\.)?(print|debug|info|warning|error|exception|critical|log|info_once|record_function|"
    r"range_push|\w*(check|assert|warn)\w*)$"  # torch._check, transformers' torch_compilable_check
)
_RECORDS = (logging.__file__, warnings.__file__, traceback.__file__)
"""The parts of the standard library whose texts are only read by people."""
NUMBERS: dict[type, Callable[[Any], Any]] = {
    torch.SymInt: int,
    torch.SymFloat: float,
    torch.SymBool: bool,
}
"""The types of symbolic numbers, and the function that gives the example's number."""


def text_of(kind: Any) -> Callable[[Any], str]:
    """In the place of `kind.__repr__`: the text of the example's number in the user's code."""
    symbol, number = kind.__repr__, NUMBERS[kind]

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
    parts = (part for node in ast.walk(tree) if (part := _text(node)) is not None)
    return frozenset(n for part in parts for n in range(part.lineno, part.end_lineno + 1))


def _text(node: ast.AST) -> Any:
    """The part of a statement whose text nothing but people read."""
    match node:
        case ast.Raise():
            return node
        case ast.Assert():
            return node.msg
        case ast.Expr(value=ast.Call(func=f)) | ast.withitem(context_expr=ast.Call(func=f)):
            part = node if isinstance(node, ast.Expr) else node.context_expr
            return part if _WRITERS.match(ast.unparse(f)) else None
    return None
