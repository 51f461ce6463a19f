"""numba's compiler where it cannot keep machine code, as in a read-only container."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from numba.core import caching

from moec.formats.jit import compiled, compiled_parallel


def squares(numbers: np.ndarray) -> int:
    total = 0
    for i in numba.prange(len(numbers)):
        total += numbers[i] * numbers[i]
    return total


def test_functions_are_compiled_where_no_folder_can_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(squares)
    for function in (compiled(squares), compiled_parallel(squares)):
        assert function(np.arange(4)) == 14
