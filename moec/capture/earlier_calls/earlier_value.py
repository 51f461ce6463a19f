"""A value that earlier calls of a module left behind, or that a clock or a generator gave.

It can be counted up, stored and printed, and what is read of it is such a value again. A branch on
it goes the way that `Decisions` says, so that both ways can be compared. Any other use raises
EarlierRead with the user's line. Other threads, which may run models with the same classes and
globals, use the value itself.
"""

from __future__ import annotations

import builtins
import copy
import datetime
import dis
import operator
import sys
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import get_ident
from types import FrameType
from typing import Any, NoReturn, cast

import numpy as np

from moec.capture.speculate.sites import Site, site_of
from moec.capture.user_code.sources import is_internal, is_standard
from moec.errors import CaptureError

_CONTAINERS = (list, deque, set, dict, np.ndarray)
_WRITING = frozenset(
    "append appendleft extend extendleft insert add update clear remove discard sort".split()
)
"""Methods of containers that return nothing of the contents."""
_READING = frozenset("pop popleft get count index copy sum mean max min".split())
_PLAIN = (
    *(int, float, complex, str, bytes, tuple, uuid.UUID),
    *(datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo),
)
"""Types whose attributes and methods change nothing."""

_MOST_DECISIONS = 100
"""How often one run may branch on such values; more often is a loop that does not end."""


@dataclass
class Decisions:
    """The branches on such values: `answers` are prescribed, others go as they would, unless `only`
    these branches may be met. `met` has the answer of each branch in a run, with the words for the
    value; `count` is how often others were met; `latest` is in words the last value made. `texts`
    has where texts of such values were made; at `changed_texts` they show other values. `absent`
    has the variables of the environment that were read and are absent, in words; they are
    EarlierValues of None where `unset`. `thread` is the one in which all this holds."""

    answers: Mapping[Site, bool] = field(default_factory=dict)
    only: bool = False
    met: dict[Site, tuple[bool, str]] = field(default_factory=dict)
    count: int = 0
    latest: str = ""
    texts: dict[Site, str] = field(default_factory=dict)
    changed_texts: frozenset[Site] = frozenset()
    absent: dict[str, Site | None] = field(default_factory=dict)
    unset: bool = False
    thread: int = field(default_factory=get_ident)

    def start(self, answers: Mapping[Site, bool], only: bool = False) -> None:
        self.answers, self.only, self.met, self.count = answers, only, {}, 0
        self.texts, self.absent = {}, {}

    def answer(self, site: Site, value: EarlierValue) -> bool | None:
        """Which way a branch on `value` goes; None where it may not be met, or is met without
        end."""
        if site in self.answers:
            answer = self.answers[site]
        else:
            self.count += 1
            if self.only or self.count > _MOST_DECISIONS:
                return None
            answer = bool(value._value)
        self.met[site] = answer, value._source
        return answer


class EarlierValue:
    """In place of `value`; `source` says in words what it is, such as "self.count"."""

    __slots__ = ("_decisions", "_source", "_value")

    def __init__(self, value: Any, source: str, decisions: Decisions) -> None:
        object.__setattr__(self, "_value", value)
        object.__setattr__(self, "_decisions", decisions)
        object.__setattr__(self, "_source", source)
        decisions.latest = source

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._value)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument in (*args, *(kwargs or {}).values()):
            if type(argument) is EarlierValue:
                if is_of_other_thread(argument):
                    return func(
                        *map(plain, args), **{k: plain(v) for k, v in (kwargs or {}).items()}
                    )
                _refuse(argument)
        return NotImplemented  # it is deeper in a container: torch names its type

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        if _compares_attributes():
            return getattr(self._value, name)
        if isinstance(self._value, _CONTAINERS):
            if name in _WRITING:
                return _ignore
            if name in _READING:
                return self._part(getattr(copy.copy(self._value), name))
        elif isinstance(self._value, _PLAIN):
            return self._part(getattr(self._value, name))
        _refuse(self)

    def _part(self, value: Any) -> EarlierValue:
        return EarlierValue(value, self._source, self._decisions)

    def __setattr__(self, name: str, value: Any) -> None:
        """What is written into the value stays there only until the capture ends."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """As for `__setattr__`."""

    def __delitem__(self, key: Any) -> None:
        """As for `__setattr__`."""

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(self._value, (*_CONTAINERS, str, bytes, tuple)):
            _refuse(self)
        try:
            return self._part(cast(Any, self._value)[plain(key)])
        except LookupError:  # the value was read before the element was stored
            return self._part(None)

    def __contains__(self, key: Any) -> Any:
        if not isinstance(self._value, (*_CONTAINERS, str, bytes, tuple)):
            _refuse(self)
        return self._part(plain(key) in self._value).__bool__(sys._getframe(1))

    def __next__(self) -> EarlierValue:
        """The next element, which stays in the iterator; 0 for that of a generator."""
        if not hasattr(type(self._value), "__next__"):
            _refuse(self)
        try:
            return self._part(next(copy.copy(self._value), None))
        except TypeError:
            return self._part(0)

    def __len__(self) -> int:
        if not _compares_attributes():
            _refuse(self)
        return len(self._value)

    def moec_length(self) -> EarlierValue:
        """len(self), which Python requires to be a plain number."""
        return self._part(len(self._value))

    def moec_sum(self) -> EarlierValue:
        return self._part(sum(map(plain, self._value)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not callable(self._value):
            _refuse(self)
        try:
            result = self._value(*map(plain, args), **{k: plain(v) for k, v in kwargs.items()})
        except LookupError:
            result = None
        return self._part(result)

    def __bool__(self, frame: FrameType | None = None) -> bool:
        frame = _user_frame(frame or sys._getframe(1))
        answer: bool | None = None
        if frame is not None and not _is_tensor(self):
            answer = self._decisions.answer(site_of(frame), self)
        if answer is not None:
            return answer
        _refuse(self)

    def __hash__(self) -> int:
        return hash(self._value)

    def __copy__(self) -> EarlierValue:
        return self

    def __deepcopy__(self, memo: Any) -> EarlierValue:
        return self

    def __repr__(self) -> str:
        return repr(_value_in_text(self))

    def __str__(self) -> str:
        return str(_value_in_text(self))

    def __format__(self, how: str) -> str:
        return format(_value_in_text(self), how)

    def __int__(self) -> int:
        return int(_printed(self))

    def __float__(self) -> float:
        return float(_printed(self))

    def __index__(self) -> int:
        return operator.index(_printed(self))


def _value_in_text(value: EarlierValue) -> Any:
    """What a text shows: the value, or another where the text must not change the result."""
    decisions, plain_value = value._decisions, value._value
    caller = _caller()
    frame = None if is_internal(caller.f_code.co_filename) else _user_frame(caller)
    if frame is None or is_of_other_thread(value):
        return plain_value
    site = Site(frame.f_code, frame.f_lasti)
    decisions.texts[site] = value._source
    if site not in decisions.changed_texts or isinstance(plain_value, bool):
        return plain_value
    if isinstance(plain_value, int | float):
        return plain_value + 1_000_003
    return f"{plain_value}1" if isinstance(plain_value, str) else plain_value


def _refuse(value: EarlierValue, *_: Any, **__: Any) -> NoReturn:
    frame = _user_frame(sys._getframe(1))
    raise reads(value._source, None if frame is None else Site(frame.f_code, frame.f_lasti))


class EarlierRead(CaptureError):
    """The module reads a value that changes from call to call."""


def reads(source: str, site: Site | None) -> EarlierRead:
    """The error where the instruction at `site` reads a value that changes from call to call."""
    lines = [f"its result depends on {source}, which changes from call to call"]
    if site is not None:
        lines.append(f"  {site}: `{site.text}` reads it")
    remedy = "make it an argument of the module, or read it only where the module is training"
    if source.startswith("os.environ"):
        remedy = "read it in __init__, and keep it as an attribute"
    lines += ["  a compiled model computes the same in every call", f"  {remedy}"]
    return EarlierRead("\n".join(lines))


def _caller() -> FrameType:
    """The frame outside of this file."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _compares_attributes() -> bool:
    """Whether torch.export looks for tensors in attributes that a trace assigned."""
    code = _caller().f_code
    return code.co_name == "_compare_values" and is_internal(code.co_filename)


def _user_frame(frame: FrameType | None) -> FrameType | None:
    while frame is not None and (
        is_internal(frame.f_code.co_filename) or is_standard(frame.f_code.co_filename)
    ):
        frame = frame.f_back
    return frame


def _printed(value: EarlierValue) -> Any:
    """The value where a text is being formatted (`"%d" % value`); elsewhere raises CaptureError."""
    frame = _caller()
    step = next((s for s in dis.get_instructions(frame.f_code) if s.offset == frame.f_lasti), None)
    if step is not None and step.opname == "BINARY_OP" and step.argrepr in ("%", "%="):
        return _value_in_text(value)
    _refuse(value)


def is_of_other_thread(value: EarlierValue) -> bool:
    decisions: Decisions = value._decisions
    return get_ident() != decisions.thread


def plain(value: Any) -> Any:
    """The value in place of which an EarlierValue is; other values as they are."""
    return value._value if type(value) is EarlierValue else value


def _ignore(*_: Any, **__: Any) -> None:
    """In place of a method that lets a container grow."""


def _counted(compute: Callable[..., Any], swapped: bool) -> Callable[..., Any]:
    """Arithmetic with plain values gives such a value again. Where the values do not fit, as where
    a size is symbolic, the old value stays: nothing but a text may read it."""

    def method(self: EarlierValue, *others: Any) -> Any:
        if any(_is_tensor(other) for other in (self._value, *others)):
            _refuse(self)
        values = list(map(plain, others))
        operands = [*values, self._value] if swapped else [self._value, *values]
        try:
            result = compute(*operands)
        except (TypeError, ValueError, ArithmeticError):
            result = self._value
        return EarlierValue(result, self._source, self._decisions)

    return method


def _is_tensor(value: Any) -> bool:
    value = plain(value)
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
for _name in ("iter and or xor rand ror rxor invert matmul rmatmul lshift rshift enter").split():
    setattr(EarlierValue, f"__{_name}__", _refuse)


def _in_its_thread(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` in the thread of the capture; in other threads, what the value itself does."""

    def call(self: EarlierValue, *others: Any, **options: Any) -> Any:
        if not is_of_other_thread(self):
            return method(self, *others, **options)
        return _plainly(name)(self._value, *map(plain, others), **options)

    return call


def _plainly(name: str) -> Callable[..., Any]:
    """The function that calls a special method of a plain value."""
    words = name.strip("_")
    of_library: dict[str, Any] = {"copy": copy.copy, "deepcopy": copy.deepcopy, "moec_length": len}
    of_library |= {"moec_sum": sum, "call": _called, "enter": _entered}
    if words in of_library:
        return cast(Callable[..., Any], of_library[words])
    if hasattr(operator, name):
        return cast(Callable[..., Any], getattr(operator, name))
    if hasattr(builtins, words):
        return cast(Callable[..., Any], getattr(builtins, words))
    compute = getattr(operator, f"__{words.removeprefix('r')}__")
    return lambda value, other: compute(other, value)


def _called(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value(*args, **kwargs)


def _entered(value: Any) -> Any:
    return type(value).__enter__(value)


_SAME_IN_ALL_THREADS = "__init__ __hash__ __repr__ __str__ __format__ __new__ __reduce__".split()
for _name, _method in list(vars(EarlierValue).items()):
    if callable(_method) and _name not in _SAME_IN_ALL_THREADS and _name[:2] in ("__", "mo"):
        setattr(EarlierValue, _name, _in_its_thread(_name, _method))
