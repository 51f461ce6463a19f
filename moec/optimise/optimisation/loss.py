"""A limit of quality: kl<=0.02, perplexity<=+1%, perplexity<=12 or error<=0.05."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from moec.errors import UsageError
from moec.passes.core.damage import Distance

_TEXT = re.compile(r"(kl|perplexity|error)\s*<=\s*(\+?)(\d+(?:\.\d*)?(?:e-?\d+)?)(%?)")


@dataclass(frozen=True)
class Loss:
    """`number` is the greatest allowed value of a metric, or with `relative` how much greater it
    may be than the original's, as a share of it."""

    metric: str
    number: float
    relative: bool = False

    def __str__(self) -> str:
        number = f"+{100 * self.number:g}%" if self.relative else f"{self.number:g}"
        return f"loss {self.metric}<={number}"

    def value(self, distance: Distance) -> float:
        """Raises UsageError for a metric that the model does not have."""
        value = getattr(distance, self.metric)
        if value is None:
            raise UsageError(
                f"{self}: {self.metric} needs a causal language model, which this model is not: "
                "limit error"
            )
        return float(value)

    def allowed(self, original: Distance) -> float:
        """The greatest value, given the original's."""
        before = self.value(original)
        return before * (1 + self.number) if self.relative else self.number

    def damage(self, limit: float, original: Distance) -> float:
        """About the damage (a divergence, or a squared error) where the metric has that value."""
        if self.metric == "perplexity":
            return max(0.0, math.log(max(limit, 1e-300) / self.value(original)))
        return limit**2 if original.kl is None else limit if self.metric == "kl" else limit**2


def parse_loss(text: str) -> Loss:
    """Raises UsageError for a text of another form."""
    match = _TEXT.fullmatch(text.strip())
    if match is None or ((match[2] or match[4]) and match[1] != "perplexity"):
        raise UsageError(
            f"loss {text!r}: write kl<=0.02, perplexity<=+1%, perplexity<=12 or error<=0.05"
        )
    relative = bool(match[2] or match[4])
    if relative and not (match[2] and match[4]):
        raise UsageError(f"loss {text!r}: write a relative limit as perplexity<=+1%")
    return Loss(match[1], float(match[3]) / (100 if relative else 1), relative)
