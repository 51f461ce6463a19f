"""Which experts the texts of a server choose, counted while somebody looks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.runtime.call.executor import Executor
from moec.runtime.dtypes import Array
from moec.runtime.package import RecordedLayer


@dataclass(eq=False)
class RoutingCounts:
    """The tokens that chose each expert so far, i64[experts] of each layer. An executor adds to
    them, one call at a time, in place of a Recorder, which keeps every choice."""

    layers: tuple[RecordedLayer, ...]
    counts: list[NDArray[np.int64]] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = [np.zeros(layer.experts, np.int64) for layer in self.layers]

    def add_main(self, choices: Sequence[Array], requests: NDArray[np.int32]) -> None:
        """Add choices [T, k] of each layer."""
        for counts, rows in zip(self.counts, choices, strict=True):
            _add(counts, rows)

    def add_decode(
        self, choices: Sequence[Array], lengths: Array, piece: int, requests: NDArray[np.int32]
    ) -> None:
        """Add the choices of a chunk, as `Recorder.add_decode`; padding is not counted."""
        full = int(lengths.sum()) == len(lengths) * piece
        real = (np.arange(piece) < lengths[:, None]).ravel()
        for counts, rows in zip(self.counts, choices, strict=True):
            if len(rows) == len(real):
                _add(counts, rows if full else rows[real])
            else:  # only the last token of each text
                _add(counts, rows[lengths > 0])


def _add(counts: NDArray[np.int64], rows: Array) -> None:
    """Ids that are no expert of the layer are not counted."""
    ids = rows.ravel()
    if ids.size and (ids.min() < 0 or ids.max() >= len(counts)):
        ids = ids[(ids >= 0) & (ids < len(counts))]
    counts += np.bincount(ids, minlength=len(counts))


COUNTING_SECONDS = 30.0


@dataclass(eq=False)
class RoutingWatch:
    """Counts the tokens of each expert while somebody reads the counts, as counting takes time in
    every step."""

    executor: Executor
    until: float = 0.0
    counting: bool = False
    counts: RoutingCounts = field(init=False)

    def __post_init__(self) -> None:
        self.counts = RoutingCounts(self.executor.package.recorded)

    def read(self) -> list[dict[str, Any]]:
        """The counts by layer; tokens are counted for COUNTING_SECONDS more."""
        self.until = time.monotonic() + COUNTING_SECONDS
        layers = zip(self.counts.layers, self.counts.counts, strict=True)
        return [{"name": layer.layer, "counts": counts.tolist()} for layer, counts in layers]

    def switch(self, ended: bool = False) -> None:
        """Begin or end counting; for the thread of the engine, between two steps."""
        watched = not ended and time.monotonic() < self.until
        if watched and not self.counting:
            self.executor.start_recording(self.counts)
        elif self.counting and not watched:
            self.executor.stop_recording()
        self.counting = watched
