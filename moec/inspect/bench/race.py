"""Runs a benchmark: all contenders in one process, one after the other in every round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moec.inspect.bench.contenders import Contender


@dataclass(frozen=True)
class Load:
    """`batch` prompts of `prompt` tokens each, then `new` tokens, one at a time."""

    batch: int
    prompt: int
    new: int
    vocabulary: int


@dataclass(frozen=True)
class Times:
    """Seconds of each prefill (all prompts at once), and of each step (one token for each text)."""

    name: str
    prefill: tuple[float, ...]
    decode: tuple[float, ...]


@dataclass(frozen=True)
class Figure:
    """A rate in tokens/s: the median, and the middle half of all measurements."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(seconds: Sequence[float], tokens: int) -> Figure:
        low, median, high = np.quantile(np.array(seconds), (0.25, 0.5, 0.75))
        return Figure(tokens / float(median), tokens / float(high), tokens / float(low))


def race(
    contenders: Sequence[Contender],
    load: Load,
    rounds: int,
    progress: Callable[[str], None] = lambda phase: None,
) -> list[Times]:
    """Times of all contenders: each runs once unmeasured, then in each of `rounds` rounds."""
    generator = np.random.default_rng(0)
    prompts = generator.integers(load.vocabulary, size=(load.batch, load.prompt)).tolist()
    follow = generator.integers(load.vocabulary, size=(load.new, load.batch, 1)).tolist()
    prefill: dict[str, list[float]] = {c.name: [] for c in contenders}
    decode: dict[str, list[float]] = {c.name: [] for c in contenders}
    for number in range(rounds + 1):
        for contender in contenders:
            progress(f"round {number} of {rounds}: {contender.name}")
            session = contender.open(load.batch, load.prompt + load.new)
            took = [_timed(lambda s=session: s.feed(prompts))]  # type: ignore[misc]
            took += [_timed(lambda s=session, t=tokens: s.feed(t)) for tokens in follow]  # type: ignore[misc]
            if number:
                prefill[contender.name].append(took[0])
                decode[contender.name] += took[1:]
    return [Times(c.name, tuple(prefill[c.name]), tuple(decode[c.name])) for c in contenders]


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def spread(figure: Figure) -> float:
    """The width of the middle half of the measurements relative to the median."""
    return (figure.high - figure.low) / figure.median if figure.median else 0.0


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of `theirs` over that of `ours`."""
    return statistics.median(theirs) / statistics.median(ours)
