"""How much calibration reduced the rounding error of one stack of weights."""

from __future__ import annotations

from dataclasses import dataclass

FEWEST = 32
"""An expert with fewer rows of calibration data is rounded to nearest."""


@dataclass(frozen=True)
class RoundingStats:
    """How well codes reproduce the stack called `weight`.

    Both errors are measured on the experts' products with their calibration rows, relative to the
    norm of the exact products: with weights rounded to nearest, and with the codes in use.
    """

    weight: str
    rows_per_expert: tuple[int, ...]
    nearest_error: float
    gptq_error: float
    experts: tuple[int, ...] = ()
    """Their numbers, if they are not all experts of a layer."""

    @property
    def undersampled(self) -> tuple[int, ...]:
        """Experts with fewer than FEWEST rows: their weights are rounded to nearest."""
        numbers = self.experts or range(len(self.rows_per_expert))
        each = zip(numbers, self.rows_per_expert, strict=True)
        return tuple(e for e, rows in each if rows < FEWEST)
