"""The measure of the difference between two results."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from moec.runtime.arrays.compare import difference

A = np.array([1.0, -4.0, 2.0], np.float32)


@pytest.mark.parametrize(
    ("actual", "expected", "apart"),
    [
        (A, A, 0.0),
        (A + np.float32(0.5), A, 0.125),
        (A[:2], A, math.inf),
        (A.astype(np.float64), A, math.inf),
        (np.array([1, 2]), np.array([1, 2]), 0.0),
        (np.array([1, 3]), np.array([1, 2]), math.inf),
        (np.array([True]), np.array([False]), math.inf),
        (np.array([np.nan, 1.0]), np.array([np.nan, 1.0]), math.inf),
        (np.array([np.nan, 1.0]), np.array([2.0, 1.0]), math.inf),
        (np.array([2.0, 1.0]), np.array([np.nan, 1.0]), math.inf),
        (np.array([np.inf, 1.0]), np.array([np.inf, 2.0]), 0.5),
        (np.array([-np.inf]), np.array([np.inf]), math.inf),
        (np.array([np.inf]), np.array([1.0]), math.inf),
        (np.zeros(2), np.zeros(2), 0.0),
        (np.ones(2), np.zeros(2), math.inf),
        (np.zeros((0, 3)), np.zeros((0, 3)), 0.0),
        (np.array([1 + 1j]), np.array([1 + 0j]), 1.0),
        (np.array([1.5], ml_dtypes.bfloat16), np.array([1.0], ml_dtypes.bfloat16), 0.5),
    ],
)
def test_difference(actual: np.ndarray, expected: np.ndarray, apart: float) -> None:  # type: ignore[type-arg]
    assert difference(actual, expected) == apart
