"""What is asked of a model that continues texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from moec.errors import InputError
from moec.runtime.text.guide import Guide
from moec.runtime.text.sampling import GREEDY, Sampling
from moec.runtime.text.speculation.draft import MOST, Draft

AUTO, OFF = "auto", "off"


@dataclass(frozen=True)
class BeamOptions:
    """Beam search with `count` beams: num_beams of transformers, as are the others.

    The score of a text is the log probability of its new tokens, divided by their number to the
    power of `length_penalty`. A search ends when `count` texts are complete, where `early_stopping`
    is True; else when the likeliest beam would not be among them at its length (False), or at the
    greatest length ("never"). The best `returned` texts are the result."""

    count: int
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    returned: int = 1

    def __post_init__(self) -> None:
        """Raises InputError where a value is of another type, or out of range."""
        for name, value in (("num_beams", self.count), ("num_return_sequences", self.returned)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise InputError(f"{name} is {value!r}; it must be a whole number, at least 1")
        penalty, stopping = self.length_penalty, self.early_stopping
        numbers = int | float | np.integer | np.floating
        if isinstance(penalty, bool) or not (isinstance(penalty, numbers) and abs(penalty) <= 10):
            raise InputError(f"length_penalty is {penalty!r}; it must be a number from -10 to 10")
        if not (isinstance(stopping, bool) or stopping == "never"):
            raise InputError(f'early_stopping is {stopping!r}; it must be True, False or "never"')
        if self.returned > self.count:
            limit = f"it must be at most num_beams, {self.count}"
            raise InputError(f"num_return_sequences is {self.returned}; {limit}")
        if self.count == 1 and (penalty != 1 or stopping is not False):
            name = "early_stopping" if penalty == 1 else "length_penalty"
            raise InputError(f"{name} is for beam search, and num_beams is 1: set num_beams")

    def check_alone(self, others: Sequence[str]) -> None:
        """Raises InputError where there are other options that are not for beams."""
        if self.count > 1 and others:
            raise InputError(
                f"num_beams is {self.count}, and {others[0]} is for texts that are drawn token by "
                "token: leave one of them out"
            )


@dataclass(frozen=True)
class Request:
    """A request for at most `most` new tokens per text, until one of `stop` is drawn, which none of
    the first `least` is. `streams` are the numbers of the texts' random numbers, by default from 0.
    With `logprobs` each token has its log probability, and those of so many likeliest ones; with
    `scores_prompt` those of the prompt too. `guide` is the beginning of a grammar that texts keep
    to. `speculate` is how many tokens of a text are guessed and verified at a time: a number, AUTO
    where that is measured to pay, or OFF; they are guesses of `draft`, or of what the text repeats.
    Neither changes a token. With several `beams` each text is searched, by itself."""

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
    beams: BeamOptions = BeamOptions(1)

    @property
    def guesses(self) -> int | None:
        """The number of `speculate`, 0 for OFF, None for AUTO."""
        if isinstance(self.speculate, str):
            return None if self.speculate == AUTO else 0
        return self.speculate

    def check_ids(self, prompt: Sequence[int], vocabulary: int) -> None:
        """Raises InputError where the prompt or `logit_bias` has none of the model's tokens, whose
        number is `vocabulary`, or each of them ends a text that may not end."""
        ids = (*prompt, *(token for token, _ in self.sampling.logit_bias))
        low, high = min(ids, default=0), max(ids, default=0)
        if low < 0 or high >= vocabulary:
            token = low if low < 0 else high
            raise InputError(f"token {token} is not one of the model's {vocabulary} tokens")
        if self.least and sum(0 <= token < vocabulary for token in self.stop) == vocabulary:
            raise InputError(
                f"min_tokens is {self.least}, and each of the {vocabulary} tokens ends a text: "
                "leave one of them out"
            )

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
        names = [f.name for f in fields(Sampling) if f.name != "seed"]
        others = [n for n in names if getattr(self.sampling, n) != getattr(GREEDY, n)]
        others += ["response_format"] * (self.guide is not None)
        others += ["speculate"] * bool(self.guesses) + ["draft"] * (self.draft is not None)
        self.beams.check_alone(others)
