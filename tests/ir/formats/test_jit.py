"""Parallel loops of numba."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from moec.ir.formats import jit


def _fill(counts: Any) -> None:
    for r in numba.prange(len(counts)):
        counts[r] = 1


def test_a_loop_has_as_many_threads_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    monkeypatch.setattr(numba, "set_num_threads", numbers.append)
    monkeypatch.setattr(jit, "threads_of_torch", lambda: 3)
    counts = np.zeros(8, np.int64)
    jit.compiled_parallel(_fill)(counts)
    assert (numbers, counts.sum()) == ([3], 8)
