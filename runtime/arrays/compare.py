"""The difference of two results, for checks that run without torch."""

from __future__ import annotations

import math

import numpy as np

from moec.runtime.dtypes import Array


def difference(actual: Array, expected: Array) -> float:
    """The greatest absolute difference over the greatest finite magnitude of `expected`.

    Infinite where shapes or dtypes differ, for NaN, also in both, where infinities are at different
    positions, or where integers differ.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return math.inf
    if expected.dtype.kind in "biu":
        return 0.0 if np.array_equal(actual, expected) else math.inf
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    a, b = actual.astype(wide), expected.astype(wide)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite]) or not np.isfinite(a[finite]).all():
        return math.inf
    if not finite.any():
        return 0.0
    scale = float(np.abs(b[finite]).max())
    apart = float(np.abs(a[finite] - b[finite]).max())
    return apart / scale if scale else (0.0 if apart == 0.0 else math.inf)
