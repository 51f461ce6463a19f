"""Parallel loops of numba."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from moec.formats import jit


def _threads(counts: Any) -> None:
    for r in numba.prange(len(counts)):
        counts[r] = numba.get_num_threads()


@pytest.mark.filterwarnings("ignore:Cannot cache compiled function")
@pytest.mark.parametrize("threads", range(1, min(2, numba.config.NUMBA_NUM_THREADS) + 1))
def test_a_loop_has_as_many_threads_as_torch(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "threads_of_torch", lambda: threads)
    counts = np.zeros(8, np.int64)
    jit.compiled_parallel(_threads)(counts)
    assert set(counts.tolist()) == {threads}
