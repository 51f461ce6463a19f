"""Evaluations that take turns at weights: each weight is read once for all of them.

Each evaluation has a thread, of which one runs at a time, until it needs weights that are absent.
Once all of them wait for weights, the one that advanced least reads its own, and all that need the
same ones go on with it. So evaluations of one model keep step, layer by layer, and each computes
what it computes alone.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Sequence, Set
from concurrent.futures import Future
from contextlib import AbstractContextManager
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from moec.torch_private import version_of

Result = TypeVar("Result")


class Together(Protocol):
    """Runs evaluations that do not depend on one another, and returns their results in order."""

    def __call__(self, evaluations: Sequence[Callable[[], Result]], /) -> list[Result]: ...


def one_by_one(evaluations: Sequence[Callable[[], Result]]) -> list[Result]:
    return [evaluation() for evaluation in evaluations]


class _Abandoned(BaseException):
    """No result of the evaluations is needed any more."""


@dataclass
class _Turn:
    """An evaluation that waits until `go`, for the time number `steps`, for the weights at the
    addresses `needed`."""

    evaluation: Callable[[], Any]
    result: Future[Any] = field(default_factory=Future)
    needed: Set[int] = frozenset()
    steps: int = 0
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


class LockStep:
    """`present(addresses)` is whether all of these weights are in memory; each thread evaluates
    with `reading()` open. Of casts, at most `limit` bytes or one are kept."""

    def __init__(
        self,
        present: Callable[[Set[int]], bool],
        reading: Callable[[], AbstractContextManager[Any]],
        limit: int,
    ) -> None:
        self._present, self._reading, self._limit = present, reading, limit
        self._idle = threading.Semaphore(0)
        self._current: _Turn | None = None
        self._abandoned = False
        self._casts: dict[Hashable, tuple[torch.Tensor, int]] = {}  # with the version of each

    def wait(self, needed: Set[int]) -> None:
        """Called by an evaluation that needs absent weights; returns when it may read them."""
        turn = self._current
        assert turn is not None
        turn.needed, turn.steps = needed, turn.steps + 1
        self._idle.release()
        self._go(turn)
        if not self._present(needed):
            self._casts.clear()

    def _go(self, turn: _Turn) -> None:
        turn.go.acquire()
        if self._abandoned:
            raise _Abandoned

    def cast(
        self, weight: torch.Tensor, options: Hashable, compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """`compute()`, the cast with these options of a weight or of a view of one. The evaluations
        share it until one of them reads other weights, or writes to it."""
        key = weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, options
        cast, version = self._casts.get(key, (None, 0))
        if cast is None or version_of(cast) != version:
            if sum(cast.nbytes for cast, _ in self._casts.values()) > self._limit:
                self._casts.clear()
            cast = compute()
            self._casts[key] = cast, version_of(cast)
        return cast

    def run(self, evaluations: Sequence[Callable[[], Result]]) -> list[Result]:
        """The results in order. Raises what the first evaluation that fails raises."""
        turns = [_Turn(evaluation) for evaluation in evaluations]
        threads = [
            threading.Thread(target=copy_context().run, args=(self._evaluate, turn), daemon=True)
            for turn in turns
        ]
        for thread in threads:
            thread.start()
        try:
            # filters of warnings are the process's, and evaluations put them back in any order
            with warnings.catch_warnings():
                while waiting := [turn for turn in turns if not turn.result.done()]:
                    ready = [turn for turn in waiting if self._present(turn.needed)]
                    for turn in ready or [min(waiting, key=lambda turn: turn.steps)]:
                        self._current = turn
                        turn.go.release()
                        self._idle.acquire()
        finally:
            self._abandoned = True
            self._casts.clear()
            for turn, thread in zip(turns, threads, strict=True):
                turn.go.release()
                thread.join()
        return [turn.result.result() for turn in turns]

    def _evaluate(self, turn: _Turn) -> None:
        try:
            self._go(turn)
            with torch.no_grad(), self._reading():
                turn.result.set_result(turn.evaluation())
        except BaseException as error:  # also of the user's code; it is raised by `run`
            turn.result.set_exception(error)
        finally:
            self._idle.release()
