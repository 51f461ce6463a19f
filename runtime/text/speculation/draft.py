"""Guesses of a second, smaller model with the same tokens (Leviathan et al. 2023, arXiv 2211.17192;
here of its likeliest tokens)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from moec.errors import InputError
from moec.runtime.package import DECODE, carries
from moec.runtime.text.texts import Decoder, Texts

LENGTHS = (3, 2)  # of the last tokens that are looked up
MOST = 7  # guesses after one look-up; with the token before them as many as a call verifies
MEMORY = 16  # guesses over which their success is averaged


class Guesses:
    """Guesses of the next tokens of one text: those that followed when its last tokens occurred
    before. `chance` is the share of them that were right lately, also of those that no call
    verified."""

    def __init__(self, tokens: Sequence[int], requested: int | None = None) -> None:
        """As many guesses are verified as `requested`, 0 for none; None: as many as pay."""
        self.chance, self.requested = 0.0, requested or 0
        self._pays, self._most = requested is None, MOST if requested is None else requested
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # where tokens occurred last, and others follow
        self._next: list[int] = []
        for token in tokens if self._most else ():
            self._append(token)

    def add(self, token: int) -> None:
        """Go on with a token."""
        if not self._most:
            return
        self._append(token)
        if self._next:
            right = self._next[0] == token
            self._next = self._next[1:] if right else []
            if self._pays:
                self.chance += (right - self.chance) / MEMORY

    @property
    def count(self) -> int:
        """How many tokens can be guessed; none where the last tokens are new."""
        return len(self._look_up())

    def next(self, count: int) -> list[int]:
        """The next tokens, at most `count`."""
        return self._look_up()[:count]

    def _look_up(self) -> list[int]:
        if not self._next and self._most:
            for length in LENGTHS:
                if end := self._ends.get(tuple(self._text[-length:])):
                    follow = self._text[end : end + self._most]
                    self._next = (follow * self._most)[: self._most]  # a loop goes on
                    break
        return self._next

    def _append(self, token: int) -> None:
        text, end = self._text, len(self._text)
        for length in LENGTHS:
            self._ends[tuple(text[-length:])] = end
        text.append(token)


FIRST_CHANCE = 0.8  # of a guess, before any was verified


class Draft:
    """A model that guesses for the texts of one engine. `chance` is the share of its guesses that
    were right lately, `seconds` the least time of the latest ones."""

    def __init__(self, executor: Decoder, vocabulary: int) -> None:
        """Raises InputError where it cannot guess for a model of `vocabulary` tokens."""
        package = executor.package
        if package.generation is None:
            raise InputError(f"the draft does not continue texts: {package.no_generation}")
        if carries(package.functions[DECODE]):
            raise InputError("the draft has recurrent states, which cannot go back: take another")
        if package.generation.vocabulary != vocabulary:
            raise InputError(
                f"the draft has {package.generation.vocabulary} tokens and the model {vocabulary}: "
                "take one with the same tokenizer"
            )
        self.executor, self.longest = executor, package.generation.longest
        self.chance = FIRST_CHANCE
        self._times: deque[float] = deque(maxlen=5)

    @property
    def seconds(self) -> float:
        return min(self._times, default=0.0)

    def judge(self, right: bool) -> None:
        self.chance += (right - self.chance) / MEMORY

    def add_time(self, seconds: float) -> None:
        self._times.append(seconds)

    def guesses(self, prompt: Sequence[int], requested: int | None, room: int) -> DraftGuesses:
        """Those of a text of at most `room` tokens; `requested` is that of `Guesses`."""
        return DraftGuesses(self, prompt, requested, room)


class DraftGuesses:
    """Guesses of the next tokens of one text: the likeliest ones of a draft, computed on demand."""

    def __init__(
        self, draft: Draft, prompt: Sequence[int], requested: int | None, room: int
    ) -> None:
        self.requested = requested or 0
        self._most = MOST if requested is None else requested
        self._draft, self._tokens = draft, [*prompt]
        limit = room + MOST
        self._room = limit if draft.longest is None else min(limit, draft.longest)
        self._texts: Texts | None = None
        self._cached = 0  # tokens of the text, and guesses after them, in the draft's caches
        self._next: list[int] = []

    @property
    def chance(self) -> float:
        return self._draft.chance

    @property
    def count(self) -> int:
        """How many tokens can be guessed."""
        return max(0, min(self._most, self._room - len(self._tokens)))

    def add(self, token: int) -> None:
        """Go on with a token."""
        if self._next:
            right = self._next[0] == token
            self._draft.judge(right)
            self._next = self._next[1:] if right else []
        if not self._next:
            self._cached = min(self._cached, len(self._tokens))
        self._tokens.append(token)

    def next(self, count: int) -> list[int]:
        """The next tokens, at most `count`."""
        count = min(count, self.count)
        if count and self._texts is None:
            self._texts = Texts(self._draft.executor, 1, self._room)
        while len(self._next) < count:
            assert self._texts is not None
            self._texts.go_back(self._cached)
            fed = [*self._tokens, *self._next][self._cached :]
            start = time.perf_counter()
            self._next.append(int(self._texts.feed([fed])[0].argmax()))
            if len(fed) == 1:
                self._draft.add_time(time.perf_counter() - start)
            self._cached += len(fed)
        return self._next[:count]
