"""Times of the calls of a model, and of the kernels in each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moec.errors import UsageError
from moec.runtime.call.caches import Cache
from moec.runtime.call.executor import Executor
from moec.runtime.checks import check_inputs
from moec.runtime.device.timed import Spans, open_timed, open_watched
from moec.runtime.dtypes import Array
from moec.runtime.package import Package


@dataclass(frozen=True)
class SortedRows:
    """What an argument of a kernel says, if it has the ends of the rows of each expert: how many
    rows there are, and how many of the `experts` have some."""

    experts: int
    rows: int
    used: int


@dataclass(frozen=True, eq=False)
class TimedCall:
    """A call of a function with inputs of these `sizes`, after which a text has `context` tokens.

    `start` and `end` are the caller's, in nanoseconds. `spans` i64[1 + K, 2] has those of the
    function, then those of the calls of K `kernels`; it is empty without a clock around them.
    `sorted_rows` has an entry for each kernel, where their arguments were watched.
    """

    sizes: Mapping[str, int]
    context: int
    start: int
    end: int
    spans: NDArray[np.int64]
    kernels: tuple[str, ...] = ()
    sorted_rows: tuple[tuple[SortedRows, ...], ...] = ()


@dataclass(eq=False)
class TimedDecoder:
    """An executor with a list of its calls. `clock` has the spans of its kernels, `watched` the
    arguments of the kernels of the current call."""

    holds_all_texts: ClassVar[bool] = True
    account: ClassVar[None] = None
    executor: Executor
    clock: Spans | None = None
    watched: list[tuple[SortedRows, ...]] = field(default_factory=list)
    calls: list[TimedCall] = field(default_factory=list)

    @property
    def package(self) -> Package:
        return self.executor.package

    def number_requests(self, count: int) -> Array:
        return self.executor.number_requests(count)

    def new_caches(self, texts: int, room: int) -> list[Cache]:
        return self.executor.new_caches(texts, room)

    def decode(
        self, counts: Sequence[Array], caches: Sequence[Cache], requests: Array, lengths: Array
    ) -> Array:
        """See `Executor.decode`."""
        texts, piece = counts[0].shape
        context = int(counts[1].max()) + piece
        sizes = {"B": texts, "S": piece, "Q": counts[2].shape[1], "L": context}
        logits: Array = self._timed(
            sizes, context, lambda: self.executor.decode(counts, caches, requests, lengths)
        )
        return logits

    def __call__(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The outputs of `main` by name. Raises InputError where an input does not fit."""
        sizes = check_inputs(self.package.main, inputs)
        outputs: Mapping[str, Any] = self._timed(sizes, 0, lambda: self.executor(inputs))
        return outputs

    def _timed(self, sizes: Mapping[str, int], context: int, call: Callable[[], Any]) -> Any:
        self.watched.clear()
        start = time.perf_counter_ns()
        result = call()
        end = time.perf_counter_ns()
        spans, names = np.zeros((0, 3), np.int64), []
        if self.clock is not None:
            spans, names = self.clock.take(), self.clock.names
        kernels = tuple(names[number] for number in spans[1:, 2])
        watched = tuple(self.watched)
        self.calls.append(TimedCall(sizes, context, start, end, spans[:, :2], kernels, watched))
        return result


def decoders(package: Package) -> tuple[TimedDecoder, TimedDecoder, TimedDecoder]:
    """The model three times, with the same weights: as it always runs; with a clock around its
    kernels; and slow, with its kernels' arguments watched.

    Raises UsageError where it is for GPUs, and ArtifactError where its library has no clock.
    """
    if package.gpu is not None:
        raise UsageError(
            "a profile is of kernels on a CPU: a call of a GPU's kernel returns before it has run"
        )
    functions, clock = open_timed(package.library, package.functions)
    watched: list[tuple[SortedRows, ...]] = []

    def watch(name: str, kernel: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        if not name.startswith(SHAPES):
            watched.append(tuple(filter(None, map(_sorted_rows, arguments))))
        return kernel(*arguments)

    slow = open_watched(package.library, package.functions, watch)
    return (
        TimedDecoder(Executor(package)),
        TimedDecoder(Executor(package, functions), clock),
        TimedDecoder(Executor(package, slow), None, watched),
    )


SHAPES = "shape_func"
"""The beginning of the names of TVM's functions that compute sizes."""


def _sorted_rows(argument: Any) -> SortedRows | None:
    """None for an argument that cannot be the ends of experts' rows."""
    if str(getattr(argument, "dtype", "")) != "int32" or len(argument.shape) != 1:
        return None
    ends = np.from_dlpack(argument)
    counts = np.diff(ends, prepend=0)
    if not ends.size or counts.min() < 0:
        return None
    return SortedRows(ends.size, int(ends[-1]), int(np.count_nonzero(counts)))
