"""The layout of weights for grouped products.

    plain     w[E, n, k], unchanged
    gated     gate[E, n, k], up[E, n, k] -> w[E, 2n, k]: 8 rows of gate, the same 8 of up, ...

A fragment of mma.sync has 8 columns. With this layout, a thread holds a column of gate and the same
column of up, and combines them in registers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moec.errors import NoMatch

GROUP = 8  # rows of gate, then of up


def interleave(gate: NDArray[np.generic], up: NDArray[np.generic]) -> NDArray[np.generic]:
    """[E, n, ...] twice -> [E, 2n, ...], for matrices or biases.

    Raises NoMatch if n is not a multiple of 8.
    """
    experts, n, *rest = gate.shape
    if n % GROUP:
        raise NoMatch(f"gate and up of {n} columns cannot be interleaved by {GROUP}")
    both = [part.reshape(experts, n // GROUP, 1, GROUP, *rest) for part in (gate, up)]
    return np.ascontiguousarray(np.concatenate(both, 2).reshape(experts, 2 * n, *rest))
