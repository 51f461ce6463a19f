"""A mean with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.96
"""Standard errors on each side of a 95 % interval."""


@dataclass(frozen=True)
class Estimate:
    """`error` is the standard error; NaN for one sample."""

    mean: float
    error: float

    @staticmethod
    def of(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
        """The mean of all numbers, of which each sample has a sum and a count; samples are taken as
        independent, numbers within one are not (a ratio estimator, Cochran 1977, 2.11)."""
        total, count, samples = float(np.sum(sums)), int(np.sum(counts)), len(sums)
        mean = total / count
        if samples < 2:
            return Estimate(mean, math.nan)
        residuals = np.asarray(sums) - mean * np.asarray(counts)
        variance = float((residuals**2).sum()) * samples / (samples - 1)
        return Estimate(mean, math.sqrt(variance) / count)

    def shown(self, form: str = ".4f") -> str:
        """With half of the 95 % interval."""
        spread = "" if math.isnan(self.error) else f" ± {Z95 * self.error:{form}}"
        return f"{self.mean:{form}}{spread}"
