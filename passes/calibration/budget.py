"""The limits on an approximate pass's loss of quality, such as "kl<=0.02,error<=0.1"."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from moec.errors import Exit, MoecError, UsageError
from moec.passes.core.damage import METRICS, Distance

_LIMIT = re.compile(r"(\w+)\s*<=\s*([0-9.eE+-]+)")


class BudgetError(MoecError):
    """A pass exceeded the budget in a strict run (--strict)."""

    exit_code = Exit.DIFFERS


@dataclass(frozen=True)
class Budget:
    """The greatest allowed value of each limited metric; an empty budget limits nothing."""

    limits: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        return ",".join(f"{metric}<={limit:g}" for metric, limit in self.limits)

    def breach(self, distance: Distance) -> str:
        """The first metric that exceeds its limit, in words; empty if none does. NaN exceeds."""
        for metric, limit in self.limits:
            value = getattr(distance, metric)
            if not value <= limit:
                return f"{metric} is {value:.3g}, the budget is {metric}<={limit:g}"
        return ""


def parse_budget(text: str) -> Budget:
    """The budget of a text "METRIC<=NUMBER,…". Raises UsageError for any other text."""
    limits: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _LIMIT.fullmatch(part)
        limit = _number(match[2]) if match else math.nan
        if match is None or match[1] not in METRICS or not limit >= 0:
            raise UsageError(
                f"--budget {part}: write METRIC<=NUMBER, where METRIC is one of "
                f"{', '.join(METRICS)}"
            )
        if match[1] in limits:
            raise UsageError(f"--budget {text}: {match[1]} has two limits")
        limits[match[1]] = limit
    return Budget(tuple(limits.items()))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
