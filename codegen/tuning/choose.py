"""Decides which tuning is faster, from noisy times.

Two tunings are compared in rounds. In a round, both process the same rows at nearly the same time,
so the median of the ratios varies little when the machine's speed does. The default stays unless
another tuning is faster by `LEAST` and by twice the error of the median, over all numbers of tokens
together, and is not slower by as much at any of them. The best of several tunings is measured
against the default again, and only these times decide and are reported, because the minimum of
noisy times is biased.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm_ffi import structural_equal

from moec.codegen.tuning.measure import TOKENS, Bench
from moec.codegen.tuning.tunable import Tunable, Values

LEAST = math.log(1.02)


@dataclass(frozen=True)
class Gain:
    """The speed-up by number of tokens, and the error of each, both as logarithms."""

    by_tokens: Mapping[int, tuple[float, float]]

    @property
    def mean(self) -> float:
        return statistics.fmean(gain for gain, _ in self.by_tokens.values())

    @property
    def noise(self) -> float:
        """Twice the error of the mean."""
        errors = [error for _, error in self.by_tokens.values()]
        return 2 * math.hypot(*errors) / len(errors)

    @property
    def convinces(self) -> bool:
        loses = any(gain < -max(LEAST, 2 * error) for gain, error in self.by_tokens.values())
        return self.mean > max(LEAST, self.noise) and not loses


def gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """The median of the rounds' log(before / after), and its standard error, both rank-based, so
    that rounds with disturbances count little."""
    logs = [math.log(b / a) for b, a in zip(before, after, strict=True)]
    middle = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(x - middle) for x in logs)
    return middle, 1.2533 * spread / math.sqrt(len(logs))


def choose(kernel: Tunable, bench: Bench) -> tuple[Values, Gain | None]:
    """The values of a kernel that differ from the default, and their gain; none if it stays."""
    default: Values = kernel.complete({})
    best = default
    for name in kernel.candidates:
        options = _different(kernel, name, best)
        if len(options) > 1:
            best = _best(options, bench)
    if best == default:
        return {}, None
    gains = _gain(bench([default, best]), 1)
    return (kernel.changed(best), gains) if gains.convinces else ({}, None)


def _best(options: Sequence[Values], bench: Bench) -> Values:
    times = bench(options)
    gains = [(_gain(times, i), option) for i, option in enumerate(options) if i]
    convincing = [(gain.mean, option) for gain, option in gains if gain.convinces]
    return max(convincing, key=lambda pair: pair[0], default=(0.0, options[0]))[1]


def _gain(times: Mapping[int, Sequence[Sequence[float]]], other: int) -> Gain:
    return Gain({tokens: gain(rounds[0], rounds[other]) for tokens, rounds in times.items()})


def _different(kernel: Tunable, name: str, best: Values) -> list[Values]:
    """`best`, and variants with another value of `name` that result in another kernel."""
    options: list[Values] = [{**best, name: value} for value in kernel.candidates[name]]
    if name == "worth":
        by_sharing = {_shared(kernel, option): option for option in options}
        now = _shared(kernel, best)
        return [best, *(option for sharing, option in by_sharing.items() if sharing != now)]
    distinct, kernels = [best], [kernel.make("kernel", best)]
    for option in options:
        one = kernel.make("kernel", option)
        if not any(structural_equal(one, other, map_free_vars=True) for other in kernels):
            distinct.append(option)
            kernels.append(one)
    return distinct


def _shared(kernel: Tunable, values: Values) -> tuple[bool, ...]:
    """For each number of tokens, whether the work is shared among threads (cpu/parallel.py)."""
    return tuple(kernel.work.of(tokens) >= values["worth"] for tokens in TOKENS)
