"""Python lists, sets and counters of the class ids that tokens chose, whose number varies."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from moec.capture.speculate.facts.symbols import is_symbolic
from moec.capture.speculate.operators.counting import counted
from moec.capture.speculate.operators.hits import HitIndex
from moec.capture.speculate.operators.hooks import Trace
from moec.capture.speculate.operators.numbers import numbers
from moec.errors import CaptureError


def _occurs(trace: Trace, ids: torch.Tensor, value: Any) -> bool:
    """Whether a class is among the ids, which is a branch on data."""
    if not isinstance(value, int) and not is_symbolic(value):
        return False
    equal: Any = ids == value
    return trace.branches.ask(equal.any(), True)


class PresentClasses(set[Any]):
    """The set of the classes among `ids`: a loop over it runs for all classes, and the proof shows
    that those without rows add nothing."""

    def __init__(self, trace: Trace, ids: torch.Tensor, classes: int) -> None:
        super().__init__(map(HitIndex, range(classes)))
        self.trace = trace
        self.ids = ids
        self.classes = torch.arange(classes)

    @property
    def tensor(self) -> torch.Tensor:
        """The classes that occur, in order."""
        return self.classes[(self.ids.flatten()[:, None] == self.classes).any(0)]

    def __contains__(self, value: object) -> bool:
        return _occurs(self.trace, self.ids, value)

    def __bool__(self) -> bool:
        return bool(self.ids.numel() > 0)


class ChosenIds(list[Any]):
    """The ids of a choice as a list that is as long as there are tokens."""

    def __init__(self, trace: Trace, ids: torch.Tensor) -> None:
        super().__init__()
        self.trace = trace
        self.tensor = ids

    def distinct(self) -> PresentClasses:
        return PresentClasses(self.trace, self.tensor, self._classes())

    def counts(self) -> dict[Any, Any]:
        """How often each class is among the ids."""
        counts = numbers(self.trace, counted(self.trace, self.tensor, self._classes()))
        return {HitIndex(number): count for number, count in enumerate(counts)}

    def count(self, value: Any) -> Any:
        return self.counts().get(value, 0)

    def __contains__(self, value: object) -> bool:
        return _occurs(self.trace, self.tensor, value)

    def __bool__(self) -> bool:
        return bool(self.tensor.shape[0] > 0)

    def __len__(self) -> int:
        raise CaptureError("the length of a list of tokens varies")

    def __iter__(self) -> Iterator[Any]:
        raise CaptureError(
            "a loop over tokens, whose number varies, cannot be unrolled: loop over the experts, "
            "and take the rows of each with torch.where(ids == expert)"
        )

    def __getitem__(self, index: Any) -> Any:
        raise CaptureError("a list of tokens is read by place: index the tensor instead")

    def _classes(self) -> builtins.int:
        choice = self.trace.facts.of(self.tensor).choice
        if choice is None:
            raise CaptureError("ids were written after they were chosen")
        return choice.classes


def update_counter(original: Callable[..., None]) -> Callable[..., None]:
    """Counter.update, which also counts the ids of a choice."""

    def update(counter: Any, iterable: Iterable[Any] | None = None, /, **named: Any) -> None:
        if isinstance(iterable, ChosenIds):
            iterable = iterable.counts()
        original(counter, iterable, **named)

    return update
