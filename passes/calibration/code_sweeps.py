"""The sweeps of coordinate descent (coordinate_descent.py), compiled by numba, which keeps
the machine code on disk. In a file of their own, because importing numba takes long and few
compilations need them."""

from __future__ import annotations

from typing import Any

import numba

from moec.ir.formats.jit import compiled, compiled_parallel

SWEEPS = 4
"""The most sweeps over a row's weights per round; then the row's numbers are fitted again."""
LEAST = 1e-6
"""Gains below this share of a change's own cost are rounding errors and ignored."""


def _row(values: Any, codes: Any, levels: Any, hessian: Any, slope: Any) -> int:
    moved = 0
    for _ in range(SWEEPS):
        before = moved
        for j in range(len(codes)):
            cost, best, gain = hessian[j, j], codes[j], 0.0
            for c in range(len(levels)):
                step = levels[c] - values[j]
                change = step * (2 * slope[j] + step * cost)
                if change < gain - LEAST * cost * step * step:
                    best, gain = c, change
            if best != codes[j]:
                step = levels[best] - values[j]
                for i in range(len(slope)):
                    slope[i] += step * hessian[j, i]
                values[j], codes[j] = levels[best], best
                moved += 1
        if moved == before:
            break
    return moved


_one = compiled(_row)


def _rows(
    values: Any, codes: Any, levels: Any, hessian: Any, slope: Any, n: int, moved: Any
) -> None:
    for r in numba.prange(len(values)):
        moved[r] = _one(values[r], codes[r], levels[r], hessian[r // n], slope[r])


sweep = compiled_parallel(_rows)
