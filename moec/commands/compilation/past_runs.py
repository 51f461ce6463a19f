"""How long compilations took on this machine, phase by phase, to say how long the next takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import msgspec

from moec import cache

MOST = 64
"""How many runs are kept, the newest."""
ALIKE = 3
"""An estimate is the median of so many runs, those of weights of the most similar size."""
_KEY = cache.key_of("seconds by phase")


@dataclass(frozen=True)
class PastRun:
    """A compilation of `weights` bytes, and the seconds of its phases."""

    weights: int
    seconds: Mapping[str, float]


def past_runs(store: cache.Store) -> list[PastRun]:
    """The runs of this machine, oldest first; none where the entry is missing or damaged."""
    stored = cache.load(store, cache.RUNS, _KEY)
    try:
        return msgspec.json.decode(stored or b"[]", type=list[PastRun])
    except msgspec.DecodeError:
        return []


def remember(store: cache.Store, run: PastRun) -> None:
    """Add a run. Of two that end at once, one may be lost."""
    runs = [*past_runs(store), run][-MOST:]
    cache.save(store, cache.RUNS, {_KEY: msgspec.json.encode([asdict(each) for each in runs])})


def expected(
    runs: Sequence[PastRun], weights: int, otherwise: Mapping[str, float]
) -> dict[str, float]:
    """The seconds of each phase in `otherwise`, by the runs of the most similar sizes; of equally
    similar ones the newest. A phase that none of them had keeps its seconds."""

    def unlike(run: PastRun) -> float:
        return abs(math.log(max(run.weights, 1) / max(weights, 1)))

    alike = sorted(reversed(runs), key=unlike)[:ALIKE]
    times = {
        name: [run.seconds[name] for run in alike if name in run.seconds] for name in otherwise
    }
    return {name: median(times[name]) if times[name] else each for name, each in otherwise.items()}
