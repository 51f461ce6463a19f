"""Bugs to insert into the CUDA C of kernels, and the schedules under which they are found."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.cuda_emulator.emulate import SCHEDULES, EmulationError, Schedule

LATE, LATE_SKEWED, EARLY, EARLY_SKEWED = SCHEDULES
ALL = frozenset(SCHEDULES)
WHERE_LATE, WHERE_SKEWED = frozenset({LATE, LATE_SKEWED}), frozenset({LATE_SKEWED, EARLY_SKEWED})


@dataclass(frozen=True)
class Bug:
    """Every `pattern` of the CUDA C becomes `text`, or the last one alone; results are wrong, or
    the launch fails with `words`, under these schedules and no others."""

    name: str
    pattern: str
    text: str
    schedules: frozenset[Schedule] = ALL
    words: str = ""
    last: bool = False

    def plant(self, source: str) -> str:
        start = source.index('extern "C" __global__')
        head, code = source[:start], source[start:]
        matches = list(re.finditer(self.pattern, code))
        assert matches, f"{self.name}: the kernel has no {self.pattern}"
        if not self.last:
            return head + re.sub(self.pattern, self.text, code)
        match = matches[-1]
        return head + code[: match.start()] + match.expand(self.text) + code[match.end() :]


def check_found(bug: Bug, is_right: Callable[[Schedule], bool]) -> None:
    """The results are wrong, or the launch fails in the bug's words, where they should."""
    outcomes: dict[str, str] = {}
    for schedule in SCHEDULES:
        try:
            outcomes[str(schedule)] = "" if is_right(schedule) else "wrong"
        except EmulationError as error:
            outcomes[str(schedule)] = str(error)
    assert {name for name, outcome in outcomes.items() if outcome} == set(map(str, bug.schedules))
    if bug.words:
        assert all(bug.words in outcome for outcome in outcomes.values() if outcome), outcomes
