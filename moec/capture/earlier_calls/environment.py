"""The environment of the process, whose variables may change between calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, MutableMapping
from types import FrameType
from typing import Any

from moec.capture.earlier_calls.earlier_value import Decisions, EarlierValue
from moec.capture.speculate.sites import Site


class Environment(MutableMapping[str, Any]):
    """`variables`, os.environ: what the user's code reads of it is an EarlierValue, where
    `is_asked` by it. A variable that is absent is None, but where `decisions` say otherwise."""

    def __init__(
        self, variables: Any, is_asked: Callable[[FrameType], bool], decisions: Decisions
    ) -> None:
        self._variables, self._is_asked, self._decisions = variables, is_asked, decisions

    def _read(self, key: str, value: Any) -> Any:
        frame = sys._getframe(2)
        if not self._is_asked(frame):
            return value
        words = f"os.environ[{key!r}]"
        if value is None:
            self._decisions.absent[words] = Site(frame.f_code, frame.f_lasti)
        if value is None and not self._decisions.unset:
            return None
        return EarlierValue(value, words, self._decisions)

    def __getitem__(self, key: str) -> Any:
        return self._read(key, self._variables[key])

    def get(self, key: str, default: Any = None) -> Any:
        return self._read(key, self._variables.get(key, default))

    def __contains__(self, key: object) -> bool:
        frame, present = sys._getframe(1), key in self._variables
        if not self._is_asked(frame):
            return present
        return bool(EarlierValue(present, f"os.environ[{key!r}]", self._decisions))

    def __setitem__(self, key: str, value: str) -> None:
        self._variables[key] = value

    def __delitem__(self, key: str) -> None:
        del self._variables[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    def __len__(self) -> int:
        return len(self._variables)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._variables, name)
