"""Clocks, generators of random numbers outside torch, ids of objects and iterators: they give
something else in each call, and running them leaves a trace."""

from __future__ import annotations

import datetime
import os
import random
import secrets
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from threading import get_ident
from types import FrameType, ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch

from moec.capture.earlier_calls.earlier_value import Decisions, EarlierValue, plain
from moec.capture.earlier_calls.environment import Environment
from moec.capture.size_functions.sizes_as_numbers import LIBRARIES
from moec.capture.speculate.sites import foreign
from moec.capture.speculate.user_globals import user_globals
from moec.capture.user_code.shadows import shadowed
from moec.capture.user_code.sources import is_internal, is_standard, package_of, packages_of

_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
_CLOCKS = (
    "time time_ns monotonic monotonic_ns perf_counter perf_counter_ns process_time process_time_ns "
    "thread_time thread_time_ns localtime gmtime ctime asctime strftime"
)
_NAMES = {
    time: _CLOCKS.split(),
    os: ["urandom", "getrandom", "getpid", "times"],
    uuid: ["uuid1", "uuid4"],
    secrets: "choice randbelow randbits token_bytes token_hex token_urlsafe".split(),
}
_UNSEEDED = (
    (random, "Random"),
    (random, "SystemRandom"),
    (np.random, "RandomState"),
    (np.random, "default_rng"),
)
"""Generators that begin with another number in each call, if they are made without a seed."""
_FUNCTIONS = tuple(
    getattr(module, name)
    for module, names in _NAMES.items()
    for name in names
    if hasattr(module, name)
)
_DATES = (datetime.datetime, datetime.date)


def always_changes(value: Any) -> bool:
    """Whether a value is an iterator, a generator of random numbers or its method, or a clock."""
    if isinstance(value, type):
        return any(value is kind for kind in _DATES)
    of_generator = isinstance(getattr(value, "__self__", None), _GENERATORS) and callable(value)
    is_clock = any(value is clock for clock in _FUNCTIONS)
    return isinstance(value, _GENERATORS) or of_generator or is_clock or _iterates(value)


def _iterates(value: Any) -> bool:
    return hasattr(type(value), "__next__")


def watched_value(value: Any, words: str, decisions: Decisions) -> Any:
    """What takes the place of a value that always changes."""
    if any(value is kind for kind in _DATES):
        return Watch(frozenset(), decisions, get_ident()).dates(value)
    return EarlierValue(value, words, decisions)


@contextmanager
def clocks_unread(module: torch.nn.Module, decisions: Decisions) -> Iterator[None]:
    """While open, what the user's code of `module` draws from generators or reads from clocks, the
    environment or ids is an EarlierValue. Other code and other threads are not affected."""
    others = foreign(name for name in LIBRARIES if name in sys.modules)
    watch = Watch.of(module, decisions)
    users = replace(watch, packages=watch.packages - {"transformers"})  # whose switches stay
    environment = Environment(os.environ, users.is_asked, decisions)
    with ExitStack() as stack:
        for owner, name, replacement in _replacements(watch):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        stack.enter_context(mock.patch.object(os, "environ", environment))
        stack.enter_context(mock.patch.object(os, "getenv", environment.get))
        of_objects = {
            "id": watch.identity(id, "id()"),
            "hash": watch.identity(hash, "hash()"),
            "len": _len,
            "sum": _sum,
        }
        for names in user_globals(module, others):
            stack.enter_context(mock.patch.dict(names, shadowed(names, of_objects)))
        yield


def _replacements(watch: Watch) -> Iterator[tuple[ModuleType, str, Any]]:
    for module, names in _NAMES.items():
        for name in names:
            if hasattr(module, name):
                yield module, name, watch.function(getattr(module, name), _words(module, name))
    for module in (random, np.random):
        for name, function in list(vars(module).items()):
            if always_changes(function) and callable(function):
                yield module, name, watch.function(function, _words(module, name))
    for module, name in _UNSEEDED:
        yield module, name, watch.generator(getattr(module, name), _words(module, name))
    for kind in _DATES:
        yield datetime, kind.__name__, watch.dates(kind)


def _words(module: ModuleType, name: str) -> str:
    return f"{module.__name__}.{name}()"


@dataclass(frozen=True)
class Watch:
    """Makes functions that give EarlierValues to the code of `packages`, and to files outside of
    packages, in the thread that made them."""

    packages: frozenset[str]
    decisions: Decisions
    thread: int

    @classmethod
    def of(cls, module: torch.nn.Module, decisions: Decisions) -> Watch:
        return cls(packages_of(module), decisions, get_ident())

    def is_asked(self, frame: FrameType) -> bool:
        file = frame.f_code.co_filename
        if get_ident() != self.thread or is_internal(file) or is_standard(file):
            return False
        return not file.endswith(".pyx") and package_of(file) in {"", *self.packages}

    def function(self, function: Callable[..., Any], words: str) -> Callable[..., Any]:
        shuffles = getattr(function, "__name__", "") == "shuffle"

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.is_asked(sys._getframe(1)):
                return function(*args, **kwargs)
            result = function(*map(plain, args), **{k: plain(v) for k, v in kwargs.items()})
            if shuffles and args:
                args[0][:] = [EarlierValue(value, words, self.decisions) for value in args[0]]
            return EarlierValue(result, words, self.decisions)

        return call

    def identity(self, number: Callable[[Any], int], words: str) -> Callable[[Any], Any]:
        """id() or hash(), which gives one EarlierValue for one number: whether a set has it depends
        on no number. Hashes of numbers are the same in all processes."""
        values: dict[int, Any] = {}

        def call(value: Any) -> Any:
            key = number(value)
            if not self.is_asked(sys._getframe(1)) or (number is hash and _is_number(value)):
                return key
            return values.setdefault(key, EarlierValue(key, words, self.decisions))

        return call

    def generator(self, make: Any, words: str) -> Any:
        """A class, or a function, that makes generators of random numbers."""

        def call(*args: Any, **kwargs: Any) -> Any:
            generator = make(*args, **kwargs)
            if args or kwargs or not self.is_asked(sys._getframe(1 + isinstance(make, type))):
                return generator
            return EarlierValue(generator, words, self.decisions)

        return _class_as(make, {}, call) if isinstance(make, type) else call

    def dates(self, kind: type) -> type:
        """datetime or date, as a class that reads no clock."""
        names = [name for name in ("now", "utcnow", "today") if hasattr(kind, name)]
        methods = {
            name: staticmethod(self.function(getattr(kind, name), f"{kind.__name__}.{name}()"))
            for name in names
        }
        return _class_as(kind, methods, kind)


class _Replacement(type):
    """The type of a class in place of `original`: instances are those of the original."""

    original: type
    make: Callable[..., Any]

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.original)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return type.__getattribute__(cls, "__dict__")["make"](*args, **kwargs)


def _class_as(original: type, methods: dict[str, Any], make: Callable[..., Any]) -> type:
    members = {**methods, "original": original, "make": make, "__module__": original.__module__}
    return _Replacement(original.__name__, (original,), members)


def _is_number(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_number, value))
    return type(value) in (int, float, bool, complex, torch.Size, torch.SymInt)


def _len(value: Any) -> Any:
    return value.moec_length() if type(value) is EarlierValue else len(value)


def _sum(values: Any, start: Any = 0) -> Any:
    return values.moec_sum() if type(values) is EarlierValue else sum(values, start)


_len.moec_shadow = True  # type: ignore[attr-defined]
