"""Rules for ops on masked rows that cannot be applied to each row separately.

A rule takes the node and its arguments, and returns a result, or NotImplemented where the op can be
applied as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.capture.speculate.facts.symbols import reads_data
from moec.capture.speculate.masked.values import (
    Count,
    Rows,
    Unmasked,
    as_indices,
    count,
    leaves,
    slice_rows,
)
from moec.torch_private import schema_of


# The axes of reductions, and the mean along the axis of masked rows.
#
# A mean divides by the number of rows in the mask; the rows outside of it are zero.
def axes_of(node: Any, x: Rows, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    """The axes along which an op of `x` works."""
    dim = _arguments(node, args, kwargs).get("dim")
    dims = [dim] if isinstance(dim, int) else list(dim or range(x.tensor.ndim))
    return [axis % x.tensor.ndim for axis in dims]


def mean(node: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(x, Rows) or x.axis not in axes_of(node, x, args, kwargs):
        return NotImplemented
    axes = axes_of(node, x, args, kwargs)
    keepdim = bool(_arguments(node, args, kwargs).get("keepdim", False))
    number = x.mask.sum()
    for axis in axes:
        if axis != x.axis:
            number = number * x.tensor.shape[axis]
    return x.zeroed().sum(axes, keepdim=keepdim) / number


def _arguments(node: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in schema_of(node.target).arguments]
    return {**dict(zip(names[1:], args, strict=False)), **kwargs}


Rule = Callable[..., Any]
ATEN = torch.ops.aten


def split_with_sizes(node: Any, x: Any, sizes: Sequence[Any], dim: int = 0) -> Any:
    if not any(isinstance(size, Count) for size in sizes):
        return NotImplemented
    parts: list[Rows] = []
    start: Any = 0
    for size in sizes:
        first = isinstance(start, int) and start == 0
        stop = size if first else count(torch.add, start, size)
        parts.append(slice_rows(x, dim, start, stop))
        start = stop
    return parts


def slice_(
    node: Any, x: Any, dim: int = 0, start: Any = None, stop: Any = None, step: int = 1
) -> Any:
    counted = any(isinstance(end, Count) for end in (start, stop))
    if not isinstance(x, Rows):
        return slice_rows(x, dim, start or 0, stop) if counted else NotImplemented
    everything = not counted and not start and (stop is None or _is_end(stop))
    if x.axis != dim or everything:
        return NotImplemented
    return slice_rows(
        x, dim, 0 if start is None else start, x.tensor.shape[dim] if stop is None else stop
    )


def _is_end(stop: Any) -> bool:
    return isinstance(stop, int) and stop > 2**62


def nonzero(node: Any, mask: Any) -> Any:
    if isinstance(mask, Rows):
        raise Unmasked("nonzero of some rows")
    position = torch.arange(mask.numel())
    columns: list[torch.Tensor] = []
    below: Any = 1
    for axis in reversed(range(mask.ndim)):
        column = position if mask.ndim == 1 else position // below
        columns.insert(0, column % mask.shape[axis] if axis else column)
        below = below * mask.shape[axis]
    return Rows(torch.stack(columns, 1), mask.reshape(-1).bool(), 0, mask.ndim == 1)


def _positions(indices: Sequence[Any]) -> list[Any]:
    """Indices with each mask as the positions that are set in it."""
    positions: list[Any] = []
    for i in indices:
        if isinstance(i, torch.Tensor) and i.dtype == torch.bool:
            rows = nonzero(None, i)
            columns = rows.tensor.unbind(1)
            positions += [Rows(column, rows.mask, 0, rows.identity) for column in columns]
        else:
            positions.append(i)
    return positions


def index(node: Any, x: Any, indices: Sequence[Any]) -> Any:
    indices = _positions(indices)
    chosen = [i for i in indices if isinstance(i, Rows)]
    if isinstance(x, Rows) and not chosen:
        raise Unmasked("some rows are read by their place")
    if not chosen:
        return NotImplemented
    tensor = x.tensor if isinstance(x, Rows) else x
    lead = next(axis for axis, i in enumerate(indices) if i is not None)
    alone = sum(i is not None for i in indices) == 1
    if isinstance(x, Rows) and not (alone and lead == 0 and x.axis == 0 and x.identity):
        raise Unmasked("some rows are read by their place")
    if alone and chosen[0].identity and chosen[0].tensor.ndim == 1:
        return Rows(tensor, chosen[0].mask, lead)
    return Rows(ATEN.index.Tensor(tensor, as_indices(indices)), chosen[0].mask, lead)


def index_put(node: Any, x: Any, indices: Sequence[Any], y: Any, accumulate: bool = False) -> Any:
    indices = _positions(indices)
    chosen = [i for i in indices if isinstance(i, Rows)]
    if not chosen:
        return NotImplemented
    if isinstance(x, Rows):
        raise Unmasked("some rows are written by their place")
    if not isinstance(y, Rows):
        rows = chosen[0].mask.shape[0]
        y = Rows(y.expand(rows, *y.shape[1:]) if y.ndim else y.expand(rows), chosen[0].mask)
    if accumulate:
        return _added(x, indices, y)
    more = _increment(node)
    if more is not None:
        return Increment(x, indices, more)
    if len(indices) == 1 and chosen[0].identity:
        shape = (-1, *[1] * (y.tensor.ndim - 1))
        return torch.where(y.mask.view(shape), y.tensor, x)
    before = ATEN.index.Tensor(x, as_indices(indices))
    return _added(x, indices, Rows(y.tensor - before, y.mask))


@dataclass
class Increment:
    """x with the result of `more` added at `indices`, for the rows in the mask."""

    x: Any
    indices: Sequence[Any]
    more: torch.fx.Node

    def of(self, y: Any) -> Any:
        return _added(self.x, self.indices, y if isinstance(y, Rows) else Rows(y, _mask(self)))


def _mask(increment: Increment) -> torch.Tensor:
    mask: torch.Tensor = next(i.mask for i in increment.indices if isinstance(i, Rows))
    return mask


def _increment(node: torch.fx.Node) -> torch.fx.Node | None:
    """The node that `x[i] += y` adds: index_put writes the sum of y and what was read at the same
    indices. None for any other write."""
    x, indices, value = node.args[:3]
    if not isinstance(value, torch.fx.Node) or str(value.target) != "aten.add.Tensor":
        return None
    for picked, more in (value.args[:2], value.args[1::-1]):
        if isinstance(picked, torch.fx.Node) and str(picked.target) == "aten.index.Tensor":
            if picked.args[0] is x and list(picked.args[1]) == list(indices):  # type: ignore[arg-type]
                return more if isinstance(more, torch.fx.Node) else None
    return None


def _added(x: Any, indices: Sequence[Any], y: Rows) -> Any:
    if isinstance(x, Rows):
        raise Unmasked("rows are added to some rows")
    first = indices[0]
    if len(indices) == 1 and first.identity:
        return x + y.zeroed().to(x.dtype)
    if len(indices) == 1:
        return x.index_add(0, first.positions(), y.zeroed().to(x.dtype))
    return x.index_put(as_indices(indices), y.zeroed().to(x.dtype), accumulate=True)


def index_add(node: Any, x: Any, dim: int, i: Any, y: Any, alpha: Any = 1) -> Any:
    if not isinstance(i, Rows):
        return NotImplemented
    if dim != 0 or alpha != 1:
        raise Unmasked("rows are added along another axis than the first")
    return _added(x, [i], y if isinstance(y, Rows) else Rows(y, i.mask))


def scatter_add(node: Any, x: Any, dim: int, i: Any, y: Any) -> Any:
    if not isinstance(i, Rows):
        return NotImplemented
    y = y if isinstance(y, Rows) else Rows(y, i.mask)
    return x.scatter_add(dim, i.positions(), y.zeroed())


def scatter_reduce(
    node: Any, x: Any, dim: int, i: Any, y: Any, how: str, include_self: bool = True
) -> Any:
    if not isinstance(i, Rows):
        return NotImplemented
    if how != "sum" or not include_self:
        raise Unmasked(f"rows are scattered with {how}")
    return scatter_add(node, x, dim, i, y)


def cat(node: Any, parts: Sequence[Any], dim: int = 0) -> Any:
    """Concatenation of consecutive parts of all rows, in which each row is in one of them."""
    if not all(isinstance(part, Rows) and part.axis == dim for part in parts):
        return NotImplemented
    total, mask = parts[0].zeroed(), parts[0].mask
    for part in parts[1:]:
        total, mask = total + part.zeroed(), mask | part.mask
    partial = any(map(reads_data, node.meta["val"].shape))
    return Rows(total, mask, dim) if partial else total


def sum_(node: Any, x: Any, dim: Any = (), *rest: Any, **named: Any) -> Any:
    if not isinstance(x, Rows) or (dim and x.axis not in [d % x.tensor.ndim for d in dim]):
        return NotImplemented
    axes = [dim] if node.target is ATEN.sum.dim_IntList else []
    return node.target(x.zeroed(), *axes, *rest, **named)


def along(node: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Ops that are refused along the axis of masked rows."""
    if isinstance(x, Rows) and x.axis in axes_of(node, x, args, kwargs):
        raise Unmasked(f"{names_of(node)} along rows that data choose")
    return NotImplemented


def filled(node: Any, *args: Any, **kwargs: Any) -> Any:
    """A tensor full of a number that was read from data."""
    *size, number = args
    if not isinstance(number, Count) or leaves(size):
        return NotImplemented
    value = node.meta["val"]
    return number.tensor.to(value.dtype).expand(value.shape)


def arange(node: Any, *args: Any, **kwargs: Any) -> Any:
    """The places of rows that data choose, among themselves."""
    start, stop, step = (0, *args, 1) if len(args) == 1 else (*args, 1)[:3]
    if not isinstance(stop, Count):
        return NotImplemented
    if (start, step) != (0, 1) or stop.mask is None:
        raise Unmasked("a range to a number read from data")
    positions = stop.mask.to(torch.int64).cumsum(0) - 1
    return Rows(positions.to(node.meta["val"].dtype), stop.mask)


def names_of(node: torch.fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


_ALONG = (
    "sort topk argsort argmax argmin max min amax amin flip roll var linalg_vector_norm prod any "
    "all cumsum softmax log_softmax"
).split()

RULES: dict[str, Rule] = {
    "split_with_sizes": split_with_sizes,
    "slice": slice_,
    "nonzero": nonzero,
    "index": index,
    "index_put": index_put,
    "index_add": index_add,
    "scatter_add": scatter_add,
    "scatter_reduce": scatter_reduce,
    "cat": cat,
    "sum": sum_,
    "full": filled,
    "scalar_tensor": filled,
    "arange": arange,
    "mean": mean,
    **dict.fromkeys(_ALONG, along),
}
