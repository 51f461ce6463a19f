"""The check of a compiled model that indices are inside of the axis that they index.

Compiled code calls it by the name NAME in the middle of a call, for indices that it computes and
whose range does not follow from how it computes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NAME = "moec.require_index"


def outside(low: int, high: int, rows: int, negative: bool, what: str) -> str | None:
    """A sentence where not all indices from `low` to `high` are inside of an axis of `rows`;
    with `negative`, they may count from its end."""
    least = -rows if negative else 0
    if least <= low and high < rows:
        return None
    limits = f"from {least} to {rows - 1}" if rows else "none, as the axis is empty"
    return (
        f"{what} has the index {low if low < least else high}, and its indices must be {limits}: "
        "PyTorch refuses these inputs too"
    )


def require_index(ids: Any, rows: Any, negative: int, what: str) -> Any:
    """A tensor of integers, and a shape of one axis with the number of rows -> `rows`. Raises
    ValueError where an index is outside."""
    array = np.from_dlpack(ids)
    if array.size:
        sentence = outside(int(array.min()), int(array.max()), int(rows[0]), bool(negative), what)
        if sentence is not None:
            raise ValueError(sentence)
    return rows
