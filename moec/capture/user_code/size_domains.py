"""Where Python's arithmetic on sizes is defined: a quotient has a divisor that is not 0.

    100 // n    n // int(n**0.5)    x * n**-0.5    math.log(n)

Eager raises ZeroDivisionError, or ValueError, at other sizes. torch assumes that no size is 0 and
traces the expression alone, whose value would be a number there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal
from unittest import mock

import sympy
import torch

from moec.capture.user_code.sources import is_internal, is_own

Limit = Literal["nonzero", "positive"]
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
_SYMBOLIC = (torch.SymInt, torch.SymFloat)
_QUOTIENTS = tuple(
    f"__{side}{method}__" for method in ("truediv", "floordiv", "mod") for side in ("", "r")
)
_RECORD = "_moec_domains"
"""The name of the list of `Domain` that a record of sizes (torch's ShapeEnv) gets."""


@dataclass(frozen=True)
class Domain:
    """An operand over torch's symbols that has to be nonzero or positive, and the user's line."""

    operand: sympy.Expr
    limit: Limit
    file: str
    line: int
    function: str


def domains_of(env: Any) -> tuple[Domain, ...]:
    """The domains of the arithmetic that was traced with a record of sizes."""
    return tuple(dict.fromkeys(getattr(env, _RECORD, ())))


@contextmanager
def domains_recorded() -> Iterator[None]:
    """While open, the user's arithmetic on symbolic sizes records where it is defined. Enter it
    after contexts that replace its operators."""
    with ExitStack() as stack:
        for kind in _SYMBOLIC:
            for name in _QUOTIENTS:
                quotient = _with_divisor(getattr(kind, name), swapped=name.startswith("__r"))
                stack.enter_context(mock.patch.object(kind, name, quotient))
            power = _with_base(kind.__pow__)
            stack.enter_context(mock.patch.object(kind, "__pow__", power))
        yield


def _with_divisor(plain: Callable[[Any, Any], Any], swapped: bool) -> Callable[[Any, Any], Any]:
    @wraps(plain)
    def divide(number: Any, other: Any) -> Any:
        if isinstance(other, _NUMBERS):
            record_domain(number if swapped else other, "nonzero")
        return plain(number, other)

    return divide


def _with_base(plain: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    @wraps(plain)
    def raise_to(base: Any, exponent: Any) -> Any:
        if isinstance(exponent, int | float) and exponent < 0:
            record_domain(base, "nonzero")
        return plain(base, exponent)

    return raise_to


def record_domain(operand: Any, limit: Limit) -> None:
    """Record that a number has to be within a limit, if it is symbolic and the user's code, or
    moec's replacement of a function that it called, computes with it."""
    frame = sys._getframe(1)
    while frame.f_back is not None and is_own(frame.f_code.co_filename):
        frame = frame.f_back
    file = frame.f_code.co_filename
    if not isinstance(operand, _SYMBOLIC) or is_internal(file):
        return
    env = operand.node.shape_env
    domain = Domain(operand.node.expr, limit, file, frame.f_lineno, frame.f_code.co_name)
    env.__dict__.setdefault(_RECORD, []).append(domain)
