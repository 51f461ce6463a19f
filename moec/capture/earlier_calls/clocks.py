"""Clocks, generators of random numbers outside torch, and iterators: they give something else in
each call, and running them leaves a trace."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import get_ident
from types import BuiltinMethodType, MethodType
from typing import Any
from unittest import mock

import numpy as np

from moec.capture.earlier_calls.earlier_value import Decisions, EarlierValue
from moec.capture.user_code.sources import is_internal, is_standard

_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
_CLOCKS = tuple(
    getattr(time, name)
    for name in "time time_ns monotonic monotonic_ns perf_counter perf_counter_ns".split()
)


def always_changes(value: Any) -> bool:
    """Whether a value is an iterator, a generator of random numbers or its method, or a clock."""
    if isinstance(value, type):
        return False
    is_method = isinstance(value, BuiltinMethodType | MethodType)
    of_generator = is_method and isinstance(value.__self__, _GENERATORS)
    is_clock = any(value is clock for clock in _CLOCKS)
    return isinstance(value, _GENERATORS) or of_generator or is_clock or _iterates(value)


def _iterates(value: Any) -> bool:
    return hasattr(type(value), "__next__")


@contextmanager
def clocks_unread(decisions: Decisions) -> Iterator[None]:
    """While open, what the user's code draws with `random` and `numpy.random` or reads from `time`
    is an EarlierValue. Other code and other threads are not affected."""
    with ExitStack() as stack:
        for module in (random, np.random, time):
            for name, function in list(vars(module).items()):
                if always_changes(function) and callable(function):
                    words = f"{module.__name__}.{name}()"
                    patch = mock.patch.object(module, name, _watched(function, words, decisions))
                    stack.enter_context(patch)
        yield


def _watched(function: Callable[..., Any], words: str, decisions: Decisions) -> Callable[..., Any]:
    thread = get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        file = sys._getframe(1).f_code.co_filename
        result = function(*args, **kwargs)
        if get_ident() != thread or is_internal(file) or is_standard(file):
            return result
        return EarlierValue(result, words, decisions)

    return call
