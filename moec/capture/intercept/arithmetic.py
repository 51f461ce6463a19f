"""The arithmetic of sizes: where Python's is defined, and what a graph cannot repeat.

    100 // n    n // int(n**0.5)    x * n**-0.5    math.sqrt(n)

Eager raises ZeroDivisionError at other sizes. torch assumes that no size is 0 and traces the
expression alone, whose value would be a number there; so each divisor is recorded. Refused are
what torch traces with other results than Python's, and what is no expression of sizes.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import sympy
import torch

from moec.capture.user_code.sources import is_internal, is_own
from moec.errors import CaptureError

_SYMBOLIC = (torch.SymInt, torch.SymFloat)
_RECORD = "_moec_domains"
"""The name of the list of `Domain` that a record of sizes (torch's ShapeEnv) gets."""
_MACHINERY = ("torch/__init__.py", "sym_node.py")
"""The files of torch between the user's operator and the trace."""


@dataclass(frozen=True)
class Domain:
    """An operand over torch's symbols that has to be nonzero, and the user's line."""

    operand: sympy.Expr
    file: str
    line: int
    function: str


def domains_of(env: Any) -> tuple[Domain, ...]:
    """The domains of the arithmetic that was traced with a record of sizes."""
    return tuple(dict.fromkeys(getattr(env, _RECORD, ())))


def checked(traced: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `traced`, by which torch records each operation on symbolic numbers."""

    def dispatch(function: Any, args: Any, kwargs: Any) -> Any:
        check = _CHECKS.get(function)
        if check is not None:
            check(*args)
        return traced(function, args, kwargs)

    return dispatch


def _divides(number: Any, divisor: Any) -> None:
    frame, _ = _user()
    if frame is None or not isinstance(divisor, _SYMBOLIC):
        return
    code = frame.f_code
    domain = Domain(divisor.node.expr, code.co_filename, frame.f_lineno, code.co_name)
    divisor.node.shape_env.__dict__.setdefault(_RECORD, []).append(domain)


def _remainder(number: Any, divisor: Any) -> None:
    if isinstance(number, torch.SymFloat) or isinstance(divisor, torch.SymFloat):
        _refuse("a % b of floats of sizes is not traced: write a - b * int(a / b)")
    _divides(number, divisor)


def _raises(base: Any, exponent: Any) -> None:
    if isinstance(exponent, int | float) and exponent < 0:
        _divides(None, base)


def floor_divides() -> bool:
    """Whether torch computes a // b of floats. It rounds a / b before the floor: 1 // 0.1 is 9.0,
    and floor(1 / 0.1) is 10."""
    return not {"__floordiv__", "__rfloordiv__"}.isdisjoint(_user()[1])


def _floors(number: Any) -> None:
    if floor_divides():
        _refuse("a // b of a size and a float is traced for whole b only: write int(a / b)")


def _bits(size: Any, other: Any) -> None:
    if isinstance(size, torch.SymInt) or isinstance(other, torch.SymInt):
        _refuse("bits of a size are no expression of sizes: compute with //, % and max")


_CHECKS: Mapping[Any, Callable[..., None]] = {
    operator.truediv: _divides,
    operator.floordiv: _divides,
    operator.mod: _remainder,
    operator.pow: _raises,
    math.floor: _floors,
    operator.and_: _bits,
    operator.or_: _bits,
    operator.xor: _bits,
}


def _refuse(reason: str) -> None:
    if _user()[0] is not None:
        raise CaptureError(reason)


def _user() -> tuple[FrameType | None, list[str]]:
    """The user's frame that computes, itself or by a handler of moec's, and the names of torch's
    methods between; None where torch computes for itself."""
    frame, methods = sys._getframe(1), list[str]()
    while frame.f_back is not None and _is_machinery(frame.f_code.co_filename):
        methods.append(frame.f_code.co_name)
        frame = frame.f_back
    return None if is_internal(frame.f_code.co_filename) else frame, methods


def _is_machinery(file: str) -> bool:
    return is_own(file) or file.endswith(_MACHINERY)


def floor_divided(plain: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """In the place of `__floordiv__`: a // b of a float and a whole b, as in
    `int(n * factor // experts)` or `n // 2.0`, is that of the whole part of a."""

    def divide(number: Any, other: Any) -> Any:
        floats = isinstance(number, torch.SymFloat) or isinstance(other, float)
        integral = isinstance(other, int | float) and other > 0 and other == int(other)
        if floats and integral:
            return _float(math.floor(number) // int(other))
        return plain(number, other)

    return divide


def rounded(size: Any, digits: int | None = None) -> Any:
    """In the place of `SymInt.__round__`, which rounds nothing."""
    if digits is not None and digits < 0:
        raise CaptureError("a size rounded to tens is no expression of sizes: use // and *")
    return size


def _float(value: Any) -> Any:
    return torch.sym_float(value)  # type: ignore[no-untyped-call]


MATH: Mapping[str, Callable[..., Any]] = {
    "sqrt": lambda value: torch.sym_sqrt(_float(value)),
    "isqrt": lambda size: math.floor(torch.sym_sqrt(_float(size))),
    "pow": lambda base, power: _float(base) ** _float(power),
}
"""Functions of the math module on symbolic numbers. Others return numbers, which fix the size."""


def of_sizes(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the math module that also takes symbolic numbers."""
    symbolic = MATH[plain.__name__]

    def function(*arguments: Any) -> Any:
        sizes = any(isinstance(argument, _SYMBOLIC) for argument in arguments)
        return symbolic(*arguments) if sizes else plain(*arguments)

    return function
