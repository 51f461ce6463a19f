"""Hooks for extremes over rows that data choose.

torch refuses the maximum of no rows, and the body of a loop over experts is traced for experts
without rows too, which the code skips. One row more, of infinities, changes no extreme of rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from moec.capture.speculate.facts.symbols import reads_data
from moec.capture.speculate.operators.hooks import Hook, Hooks, Trace


def with_row(trace: Trace, x: Any, dim: Any, infinity: float) -> torch.Tensor | None:
    """`x` with a row of `infinity` along the axis `dim`, whose length data decide; else None.
    Code without a branch on data does not skip experts without rows: it fails there."""
    if not (isinstance(x, torch.Tensor) and x.is_floating_point() and trace.branches.questions):
        return None
    axes = [dim] if isinstance(dim, int) else dim if isinstance(dim, list | tuple) else ()
    chosen = [axis for axis in axes if isinstance(axis, int) and reads_data(x.shape[axis])]
    if len(chosen) != 1:
        return None
    shape = list(x.shape)
    shape[chosen[0]] = 1
    return torch.cat([x, x.new_full(shape, infinity)], chosen[0])


def reduced(
    infinity: float,
    trace: Trace,
    func: Hook,
    x: torch.Tensor,
    dim: Any = (),
    *rest: Any,
    **options: Any,
) -> Any:
    """amax, amin and logsumexp."""
    more = with_row(trace, x, dim, infinity)
    return NotImplemented if more is None else func(more, dim, *rest, **options)


def chosen(
    infinity: float,
    trace: Trace,
    func: Hook,
    x: torch.Tensor,
    dim: Any = None,
    keepdim: bool = False,
) -> Any:
    """max and min along an axis, with the values and the indices apart: most code reads one."""
    more = with_row(trace, x, dim, infinity)
    if more is None:
        return NotImplemented
    value, index, result = (
        (torch.amax, torch.argmax, torch.return_types.max)
        if infinity < 0
        else (torch.amin, torch.argmin, torch.return_types.min)
    )
    pair: Any = (value(more, dim, keepdim), index(more, dim, keepdim))
    return result(pair)


EXTREMES: Hooks = {
    "amax": partial(reduced, -torch.inf),
    "amin": partial(reduced, torch.inf),
    "logsumexp": partial(reduced, -torch.inf),
    "max": partial(chosen, -torch.inf),
    "min": partial(chosen, torch.inf),
}
