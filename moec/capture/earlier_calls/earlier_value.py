"""A value that earlier calls of a module left behind, or that a clock or a generator gave.

It can be counted up, stored and printed. A branch on it goes the way that `Decisions` says, so that
both ways can be compared. Any other use raises CaptureError with the user's line.
"""

from __future__ import annotations

import dis
import operator
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

from moec.capture.speculate.sites import Site, site_of
from moec.capture.user_code.sources import is_internal, is_standard
from moec.errors import CaptureError

_GROWING = frozenset("append appendleft extend extendleft insert add update clear".split())
"""Methods of containers that return nothing of the contents."""

_MOST_DECISIONS = 100
"""How often one run may branch on such values; more often is a loop that does not end."""


@dataclass
class Decisions:
    """The branches on such values in one run: `answers` are prescribed, others go as they would.
    `met` has the answer of each branch, with the words for the value; `count` is how often they
    were taken."""

    answers: Mapping[Site, bool] = field(default_factory=dict)
    met: dict[Site, tuple[bool, str]] = field(default_factory=dict)
    count: int = 0

    def start(self, answers: Mapping[Site, bool]) -> None:
        self.answers, self.met, self.count = answers, {}, 0


class EarlierValue:
    """In place of `value`; `source` says in words what it is, such as "self.count"."""

    __slots__ = ("_decisions", "_source", "_value")

    def __init__(self, value: Any, source: str, decisions: Decisions) -> None:
        object.__setattr__(self, "_value", value)
        object.__setattr__(self, "_decisions", decisions)
        object.__setattr__(self, "_source", source)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._value)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument in (*args, *(kwargs or {}).values()):
            if type(argument) is EarlierValue:
                _refuse(argument)
        return NotImplemented  # it is deeper in a container: torch names its type

    def __getattr__(self, name: str) -> Any:
        if name in _GROWING and isinstance(self._value, list | deque | set | dict):
            return _ignore
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        _refuse(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """What is written into the value stays there only until the capture ends."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """As for `__setattr__`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not callable(self._value):
            _refuse(self)
        return EarlierValue(self._value(*args, **kwargs), self._source, self._decisions)

    def __bool__(self) -> bool:
        frame = _user_frame(sys._getframe(1))
        decisions = self._decisions
        decisions.count += 1
        if frame is None or _is_tensor(self) or decisions.count > _MOST_DECISIONS:
            _refuse(self)
        site = site_of(frame)
        answer: bool = decisions.answers.get(site, bool(self._value))
        decisions.met[site] = answer, self._source
        return answer

    def __hash__(self) -> int:
        return hash(self._value)

    def __copy__(self) -> EarlierValue:
        return self

    def __deepcopy__(self, memo: Any) -> EarlierValue:
        return self

    def __repr__(self) -> str:
        return repr(self._value)

    def __str__(self) -> str:
        return str(self._value)

    def __format__(self, how: str) -> str:
        return format(self._value, how)

    def __int__(self) -> int:
        return int(_printed(self))

    def __float__(self) -> float:
        return float(_printed(self))

    def __index__(self) -> int:
        return operator.index(_printed(self))


def _refuse(value: EarlierValue, *_: Any, **__: Any) -> NoReturn:
    frame = _user_frame(sys._getframe(1))
    raise reads(value._source, None if frame is None else Site(frame.f_code, frame.f_lasti))


def reads(source: str, site: Site | None) -> CaptureError:
    """The error where the instruction at `site` reads a value that changes from call to call."""
    lines = [f"its result depends on {source}, which changes from call to call"]
    if site is not None:
        lines.append(f"  {site}: `{site.text}` reads it")
    lines += [
        "  a compiled model computes the same in every call",
        "  make it an argument of the module, or read it only where the module is training",
    ]
    return CaptureError("\n".join(lines))


def _user_frame(frame: FrameType | None) -> FrameType | None:
    while frame is not None and (
        is_internal(frame.f_code.co_filename) or is_standard(frame.f_code.co_filename)
    ):
        frame = frame.f_back
    return frame


def _printed(value: EarlierValue) -> Any:
    """The value where a text is being formatted (`"%d" % value`); elsewhere raises CaptureError."""
    frame = sys._getframe(2)
    step = next((s for s in dis.get_instructions(frame.f_code) if s.offset == frame.f_lasti), None)
    if step is not None and step.opname == "BINARY_OP" and step.argrepr in ("%", "%="):
        return value._value
    _refuse(value)


def _ignore(*_: Any, **__: Any) -> None:
    """In place of a method that lets a container grow."""


def _counted(compute: Callable[..., Any], swapped: bool) -> Callable[..., Any]:
    """Arithmetic with plain values gives such a value again. Where the values do not fit, as where
    a size is symbolic, the old value stays: nothing but a text may read it."""

    def method(self: EarlierValue, *others: Any) -> Any:
        if any(_is_tensor(other) for other in (self._value, *others)):
            _refuse(self)
        plain = [o._value if type(o) is EarlierValue else o for o in others]
        operands = [*plain, self._value] if swapped else [self._value, *plain]
        try:
            result = compute(*operands)
        except (TypeError, ValueError, ArithmeticError):
            result = self._value
        return EarlierValue(result, self._source, self._decisions)

    return method


def _is_tensor(value: Any) -> bool:
    value = value._value if type(value) is EarlierValue else value
    return hasattr(type(value), "__torch_function__") and hasattr(type(value), "data_ptr")


def _extended(self: EarlierValue, other: Any) -> EarlierValue:
    if isinstance(self._value, list | set | dict):
        return self
    result: EarlierValue = self + other
    return result


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(EarlierValue, f"__{_name}__", _counted(getattr(operator, _name), swapped=False))
    setattr(EarlierValue, f"__r{_name}__", _counted(getattr(operator, _name), swapped=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(EarlierValue, f"__{_name}__", _counted(getattr(operator, _name), swapped=False))
for _name in ("neg", "pos", "abs"):
    setattr(EarlierValue, f"__{_name}__", _counted(getattr(operator, _name), swapped=False))
EarlierValue.__round__ = _counted(round, swapped=False)  # type: ignore[attr-defined]
EarlierValue.__iadd__ = _extended  # type: ignore[attr-defined]
for _name in (
    "len iter next getitem contains and or xor rand ror rxor invert matmul "
    "rmatmul lshift rshift enter delitem"
).split():
    setattr(EarlierValue, f"__{_name}__", _refuse)
