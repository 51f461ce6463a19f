"""Hooks for scatter and gather.

An index that repeats row numbers along the features makes them index_add and indexing by rows. Ones
that are scattered to the choices among classes are the sum of the one-hot rows of these choices.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from moec.capture.speculate.operators.hooks import Hook, Hooks, Trace


def rows(
    trace: Trace, x: torch.Tensor, dim: int, index: torch.Tensor, y: Any
) -> torch.Tensor | None:
    """The rows [n] of an index [n, D] into x [T, D], for y [n, D]; None for any other index."""
    column = trace.facts.of(index).column
    matrices = x.ndim == index.ndim == 2 and isinstance(y, torch.Tensor) and y.ndim == 2
    if column is None or dim != 0 or not matrices:
        return None
    return column if index.shape[1] == x.shape[1] == y.shape[1] else None


def scatter_add(
    trace: Trace, func: Hook, x: torch.Tensor, dim: int, index: torch.Tensor, src: Any
) -> Any:
    column = rows(trace, x, dim, index, src)
    return NotImplemented if column is None else x.index_add(0, column, src)


def scatter_add_(
    trace: Trace, func: Hook, x: torch.Tensor, dim: int, index: torch.Tensor, src: Any
) -> Any:
    column = rows(trace, x, dim, index, src)
    if column is None:
        return NotImplemented
    trace.written(x)
    return x.index_add_(0, column, src)


def reduced(
    add: Hook,
    trace: Trace,
    func: Hook,
    x: torch.Tensor,
    dim: int,
    index: torch.Tensor,
    src: Any,
    reduce: str,
    *,
    include_self: bool = True,
) -> Any:
    """scatter_reduce by sums, as the hook `add` adds."""
    sums = reduce == "sum" and include_self
    return add(trace, func, x, dim, index, src) if sums else NotImplemented


def gather(
    trace: Trace, func: Hook, x: torch.Tensor, dim: int, index: torch.Tensor, **_: Any
) -> Any:
    column = rows(trace, x, dim, index, index)
    return NotImplemented if column is None else x[column]


def marks(
    trace: Trace, x: torch.Tensor, dim: int, index: torch.Tensor, value: Any
) -> dict[str, Any] | None:
    """The facts of zeros [.., C] with ones at different classes 0 .. C-1; None for others."""
    zero, fact = trace.facts.of(x).zero, trace.facts.of(index)
    classes = None if fact.choice is None else fact.choice.classes
    last = x.ndim > 1 and dim in (-1, x.ndim - 1)
    if not (zero and last and fact.distinct and type(value) in (int, float) and value == 1):
        return None
    if classes is None or x.shape[-1] != classes:
        return None
    return {"high": 1, "hot": (fact.choice, index.numel())}


def scatter(
    trace: Trace,
    func: Hook,
    x: torch.Tensor,
    dim: int,
    index: torch.Tensor,
    value: Any = None,
    **rest: Any,
) -> Any:
    """scatter and scatter_ of ones into zeros, whose result is noted as ones at classes."""
    facts = None if rest else marks(trace, x, dim, index, value)
    if facts is None:
        return NotImplemented
    if func.__name__ == "scatter_":
        trace.written(x)
    return trace.facts.note(func(x, dim, index, value), **facts)


SCATTERING: Hooks = {
    "scatter": scatter,
    "scatter_": scatter,
    "scatter_add": scatter_add,
    "scatter_add_": scatter_add_,
    "scatter_reduce": partial(reduced, scatter_add),
    "scatter_reduce_": partial(reduced, scatter_add_),
    "gather": gather,
}
