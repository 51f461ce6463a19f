"""The environment of the process, whose variables may change between calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, MutableMapping
from types import FrameType
from typing import Any

from moec.capture.earlier_calls.earlier_value import Decisions, EarlierValue


class Environment(MutableMapping[str, Any]):
    """`variables`, os.environ: what the user's code reads of it is an EarlierValue, where
    `is_asked` by it. A variable that is absent is None, which has no place for a value."""

    def __init__(
        self, variables: Any, is_asked: Callable[[FrameType], bool], decisions: Decisions
    ) -> None:
        self._variables, self._is_asked, self._decisions = variables, is_asked, decisions

    def _read(self, key: str, value: Any) -> Any:
        if value is None or not self._is_asked(sys._getframe(2)):
            return value
        return EarlierValue(value, f"os.environ[{key!r}]", self._decisions)

    def __getitem__(self, key: str) -> Any:
        return self._read(key, self._variables[key])

    def get(self, key: str, default: Any = None) -> Any:
        return self._read(key, self._variables.get(key, default))

    def __contains__(self, key: object) -> bool:
        return key in self._variables

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
