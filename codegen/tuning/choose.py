"""Which tuning is faster, from times that are noisy.

Two tunings are compared round by round: their times of one round had the same rows and nearly the
same moment, so that the median of these ratios moves little when the machine's speed does. The
default stays unless another one is faster by `LEAST` and by twice the error of that median, over
all numbers of tokens together, and slower at none of them by as much. What won among several is
measured against the default once more, and those times decide and are reported: the best of
many noisy ones looks better than it is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tvm_ffi import structural_equal

from moec.codegen.cpu.tuning import DEFAULT, Tuning, candidates
from moec.codegen.tuning.measure import TOKENS, Bench
from moec.codegen.tuning.tunable import Tunable

LEAST = math.log(1.02)


@dataclass(frozen=True)
class Gain:
    """How many times as fast, by number of tokens, and the error of each: both as logarithms."""

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
    """The median of the rounds' log(before / after), and its standard error, both from ranks: a
    round in which the machine did something else counts little."""
    logs = [math.log(b / a) for b, a in zip(before, after, strict=True)]
    middle = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(x - middle) for x in logs)
    return middle, 1.2533 * spread / math.sqrt(len(logs))


def choose(kernel: Tunable, bench: Bench) -> tuple[Tuning, Gain | None]:
    """The tuning of a kernel, and what it gains; None where the default stays."""
    best = DEFAULT
    for name in kernel.values:
        options = _different(kernel, name, best)
        if len(options) > 1:
            best = _best(options, bench)
    if best == DEFAULT:
        return best, None
    found = _gain(bench([DEFAULT, best]), 1)
    return (best, found) if found.convinces else (DEFAULT, None)


def _best(options: Sequence[Tuning], bench: Bench) -> Tuning:
    times = bench(options)
    gains = {options[i]: _gain(times, i) for i in range(1, len(options))}
    convincing = [option for option, found in gains.items() if found.convinces]
    return max(convincing, key=lambda option: gains[option].mean, default=options[0])


def _gain(times: Mapping[int, Sequence[Sequence[float]]], other: int) -> Gain:
    return Gain({tokens: gain(some[0], some[other]) for tokens, some in times.items()})


def _different(kernel: Tunable, name: str, best: Tuning) -> list[Tuning]:
    """`best`, and others that differ from it in the value of that name and in what they do."""
    options = [replace(best, **{name: value}) for value in candidates(name)]
    if name == "worth":
        known = {
            tuple(work(kernel, t) >= option.worth for t in TOKENS): option for option in options
        }
        own = tuple(work(kernel, t) >= best.worth for t in TOKENS)
        return [best, *(option for shared, option in known.items() if shared != own)]
    found, made = [best], [kernel.make("kernel", best)]
    for option in options:
        one = kernel.make("kernel", option)
        if not any(structural_equal(one, other, map_free_vars=True) for other in made):
            found.append(option)
            made.append(one)
    return found


def work(kernel: Tunable, tokens: int) -> int:
    """What a kernel's loop compares with `worth` (cpu/parallel.py)."""
    rows = tokens * kernel.top_k
    sums = sum(layout.sums for layout in kernel.layouts)
    return rows * sums + min(rows, kernel.experts) * sum(layout.bytes for layout in kernel.layouts)
