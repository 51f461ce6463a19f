"""Limits of a few kilobytes for tests, which count weights alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from moec.sources.checkpoint import load
from moec.sources.memory import budget, spool
from moec.sources.memory.budget import MemoryBudget

SMALL = 1 << 15
"""Bytes: half of it holds one weight of the models of `checkpoint.families`, and not two."""


def count_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compilation is as if neither its process nor its compiler and operators took memory."""

    def of_weights(limit: int, weights: Sequence[object]) -> MemoryBudget:
        return MemoryBudget(limit, 0, 0, 0, 0)

    monkeypatch.setattr(load, "budget_of", of_weights)
    monkeypatch.setattr(budget, "resident_bytes", lambda: 0)
    monkeypatch.setattr(load, "LEAST", 0)
    monkeypatch.setattr(spool, "LEAST", 0)
