"""Hooks for scatter and gather whose index repeats row numbers along the features: they become
index_add and indexing by rows."""

from __future__ import annotations

from typing import Any

import torch

from moec.capture.speculate.hooks import Hook, Hooks, Trace


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


def scatter_reduce(
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
    sums = reduce == "sum" and include_self
    return scatter_add(trace, func, x, dim, index, src) if sums else NotImplemented


def scatter_reduce_(
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
    sums = reduce == "sum" and include_self
    return scatter_add_(trace, func, x, dim, index, src) if sums else NotImplemented


def gather(
    trace: Trace, func: Hook, x: torch.Tensor, dim: int, index: torch.Tensor, **_: Any
) -> Any:
    column = rows(trace, x, dim, index, index)
    return NotImplemented if column is None else x[column]


SCATTERING: Hooks = {
    "scatter_add": scatter_add,
    "scatter_add_": scatter_add_,
    "scatter_reduce": scatter_reduce,
    "scatter_reduce_": scatter_reduce_,
    "gather": gather,
}
