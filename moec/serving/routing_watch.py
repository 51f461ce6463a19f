"""Which experts the texts of a server choose, counted while somebody looks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from moec.runtime.call.executor import Executor
from moec.runtime.call.routing_counts import RoutingCounts

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
