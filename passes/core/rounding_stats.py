"""What calibration did for the codes of one stack of weights."""

from __future__ import annotations

from dataclasses import dataclass

FEWEST = 32
"""Rows of calibration data below which an expert is rounded to nearest."""


@dataclass(frozen=True)
class Fit:
    """How well codes stand for the weights of `place`: `seen` are the rows of each expert; the
    errors are those of its products on all of these, as a share of their norm."""

    place: str
    seen: tuple[int, ...]
    nearest: float
    solved: float

    @property
    def few(self) -> tuple[int, ...]:
        """Experts that saw too few rows, and were rounded to nearest."""
        return tuple(e for e, rows in enumerate(self.seen) if rows < FEWEST)
