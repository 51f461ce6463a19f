"""Rows of results that differ, of layers whose near ties send tokens to other experts."""

from __future__ import annotations

from torch import Tensor

from moec.oracle.tolerance import row_errors


def strays(actual: Tensor, expected: Tensor, limit: float) -> tuple[int, int]:
    """The number of rows whose error exceeds `limit`, and the number of rows."""
    errors = row_errors(actual, expected)
    return int((errors > limit).sum()), len(errors)
