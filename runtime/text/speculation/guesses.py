"""What a text will probably go on with, looked up in the text itself, so that a call can verify
several tokens (prompt lookup decoding, Saxena 2023)."""

from __future__ import annotations

from collections.abc import Sequence

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
