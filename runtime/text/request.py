"""What is asked of a model that continues texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moec.errors import InputError
from moec.runtime.text.guide import Guide
from moec.runtime.text.sampling import GREEDY, Sampling
from moec.runtime.text.speculation.draft import Draft
from moec.runtime.text.speculation.guesses import MOST

AUTO, OFF = "auto", "off"


@dataclass(frozen=True)
class Request:
    """A request for at most `most` new tokens per text, until one of `stop` is drawn, which none of
    the first `least` is. `streams` are the numbers of the texts' random numbers, by default from 0.
    With `logprobs` each token has its log probability, and those of so many likeliest ones; with
    `scores_prompt` those of the prompt too. `guide` is the beginning of a grammar that texts keep
    to. `speculate` is how many tokens of a text are guessed and verified at a time: a number, AUTO
    where that is measured to pay, or OFF; they are guesses of `draft`, or of what the text repeats.
    Neither changes a token."""

    most: int = 64
    sampling: Sampling = GREEDY
    stop: frozenset[int] = frozenset()
    streams: tuple[int, ...] = ()
    least: int = 0
    logprobs: int | None = None
    guide: Guide | None = None
    speculate: int | str = AUTO
    draft: Draft | None = None
    scores_prompt: bool = False

    @property
    def guesses(self) -> int | None:
        """The number of `speculate`, 0 for OFF, None for AUTO."""
        if isinstance(self.speculate, str):
            return None if self.speculate == AUTO else 0
        return self.speculate

    def __post_init__(self) -> None:
        if isinstance(self.most, bool) or not isinstance(self.most, int | np.integer):
            raise InputError(f"max_new_tokens is {self.most!r}; it must be a whole number")
        if self.most < 1:
            raise InputError(f"max_new_tokens is {self.most}; it must be at least 1")
        if isinstance(self.least, bool) or not isinstance(self.least, int | np.integer):
            raise InputError(f"min_tokens is {self.least!r}; it must be a whole number")
        numbers = isinstance(self.speculate, int) and 1 <= self.speculate <= MOST
        if isinstance(self.speculate, bool) or not (numbers or self.speculate in (AUTO, OFF)):
            raise InputError(
                f"speculate is {self.speculate!r}; it must be {AUTO}, {OFF}, or from 1 to {MOST}"
            )
        if not 0 <= self.least <= self.most:
            raise InputError(
                f"min_tokens is {self.least}; it must be from 0 to max_new_tokens, {self.most}"
            )
