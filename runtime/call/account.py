"""The account of speculation: what calls for one token and for several of a text cost, and save."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

VERIFIED = 8  # the most tokens of a text that attention verifies with the bits of one at a time
ROWS = (1, 2, 4, VERIFIED)  # tokens of each text in one call; guesses are all but the first
TRIALS = 2  # calls that tell the time of one of them
LASTS = 256  # calls after which a time is measured again
LEAST = 0.2  # the mean chance of a guess below which none is worth a trial
WORTH = 1.2  # the speed with guesses, by that without, to use them: their chance is of few


@dataclass(eq=False)
class Account:
    """Of the calls of one model on one machine. `guessed` tokens were verified in `calls`, and
    `accepted` of them were drawn: each saved its text a step."""

    paused: bool = False  # while routing is recorded, which is that of drawn tokens alone
    calls: int = 0
    guessed: int = 0
    accepted: int = 0
    _seconds: defaultdict[tuple[int, int], deque[float]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=5))
    )
    _plain: Counter[int] = field(default_factory=Counter)

    def add(self, texts: int, rows: int, seconds: float, guessed: int, accepted: int) -> None:
        """Add a call that took so long, of some texts with `rows` tokens each."""
        self._seconds[texts, rows].append(seconds)
        self.calls += guessed > 0
        self.guessed += guessed
        self.accepted += accepted
        if rows == 1:
            self._plain[texts] += 1
            if self._plain[texts] % LASTS == 0:  # other times may be of shorter texts
                for other in ROWS[1:]:
                    if len(seconds_of := self._seconds[texts, other]) >= TRIALS:
                        seconds_of.popleft()

    def rows(self, guesses: Sequence[tuple[int, float]], cost: float = 0.0) -> int:
        """How many tokens of each text in a call give the most tokens a second, by the guesses of
        each: their number, and the chance of the next to be right if the last was. `cost` is the
        time of a guess, in seconds."""
        texts, plain = len(guesses), self._seconds[len(guesses), 1]
        if sum(n and chance for n, chance in guesses) < LEAST * texts or len(plain) < TRIALS:
            return 1
        best, best_speed = 1, WORTH * texts / min(plain)
        for rows in ROWS[1:]:
            if len(seconds := self._seconds[texts, rows]) < TRIALS:
                return rows
            tokens = texts + sum(_expected(chance, min(n, rows - 1)) for n, chance in guesses)
            guessing = cost * sum(min(n, rows - 1) for n, _ in guesses)
            if (speed := tokens / (min(seconds) + guessing)) > best_speed:
                best, best_speed = rows, speed
        return best


def _expected(chance: float, guesses: int) -> float:
    """How many of some guesses are right before the first that is not."""
    return chance * (1 - chance**guesses) / (1 - chance) if chance < 1 else guesses
