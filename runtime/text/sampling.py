"""Sampling: the next token of each text from its logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moec.errors import InputError
from moec.runtime.dtypes import Array


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    `temperature` 0 takes the likeliest token (of equals the lowest id). Otherwise logits are
    divided by it; `top_k` keeps the k likeliest tokens, then `top_p` the fewest whose
    probabilities reach p (nucleus sampling, arXiv 1904.09751). The same `seed` gives the same
    texts, independent of the other texts of the batch; None takes a new seed each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises InputError where a value is of another type, or out of range."""
        for name in ("temperature", "top_p"):
            if not _is_a(getattr(self, name), int, float, np.integer, np.floating):
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be a number")
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            if value is not None and not _is_a(value, int, np.integer):
                raise InputError(f"{name} is {value!r}; it must be a whole number, or omitted")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed is {self.seed}; it must be 0 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature is {self.temperature}; it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; it must be at least 1, or omitted")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k is not None):
            raise InputError(
                "top_p and top_k limit sampling, and temperature 0 does not sample: set a "
                "temperature, such as 1"
            )

    def generator(self, text: int) -> np.random.Generator:
        """The stream of random numbers of text number `text`; a new one without a seed."""
        return np.random.default_rng(None if self.seed is None else [self.seed, text])


def _is_a(value: object, *types: type) -> bool:
    """Whether a value is of one of the types; a bool, which Python counts as an int, is not."""
    return isinstance(value, types) and not isinstance(value, bool)


GREEDY = Sampling()


def choose(
    logits: Array, sampling: Sampling, generators: Sequence[np.random.Generator]
) -> list[int]:
    """The next token of each row of logits f32[B, V]."""
    if sampling.temperature == 0:
        return [int(token) for token in logits.argmax(-1)]
    return [_draw(row, sampling, g) for row, g in zip(logits, generators, strict=True)]


def _draw(logits: Array, sampling: Sampling, generator: np.random.Generator) -> int:
    scores = logits.astype(np.float64)
    order = np.argsort(-scores, kind="stable")
    if sampling.top_k is not None:
        order = order[: sampling.top_k]
    with np.errstate(over="ignore"):  # at a temperature near 0 all but the likeliest have none
        shares = np.exp((scores[order] - scores[order[0]]) / sampling.temperature)
    shares /= shares.sum()
    if sampling.top_p < 1:
        count = int(np.searchsorted(np.cumsum(shares), sampling.top_p)) + 1
        order, shares = order[:count], shares[:count]
    ends = np.cumsum(shares)
    index = np.searchsorted(ends, generator.random() * ends[-1], side="right")
    return int(order[min(int(index), len(order) - 1)])
