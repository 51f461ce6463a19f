"""What calibration did for the codes of one stack of weights."""

from __future__ import annotations

from dataclasses import dataclass

FEWEST = 32
"""Rows of calibration data below which an expert is rounded to nearest."""


@dataclass(frozen=True)
class RoundingStats:
    """How well codes reproduce the stack called `weight`.

    Both errors are those of the experts' products on their calibration rows, relative to the norm
    of the exact products: of weights rounded to nearest, and of the codes in use.
    """

    weight: str
    rows_per_expert: tuple[int, ...]
    nearest_error: float
    gptq_error: float

    @property
    def undersampled(self) -> tuple[int, ...]:
        """Experts with fewer than FEWEST rows: their weights are rounded to nearest."""
        return tuple(e for e, rows in enumerate(self.rows_per_expert) if rows < FEWEST)
