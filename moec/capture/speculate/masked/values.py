"""Values of the masked form: rows that data select, and numbers read from data."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moec.torch_private import pytree


class Unmasked(Exception):
    """The program does something with rows that a mask cannot express. The message says what."""


@dataclass
class Rows:
    """The rows of `tensor` along `axis` that are set in `mask`, in order. With `identity`, the
    values are the positions of all rows, so that indexing with them changes no row."""

    tensor: torch.Tensor
    mask: torch.Tensor
    axis: int = 0
    identity: bool = False

    def zeroed(self) -> torch.Tensor:
        """The tensor with zeros in the rows that are not set in the mask."""
        shape = [1] * self.tensor.ndim
        shape[self.axis] = -1
        return torch.where(self.mask.view(shape), self.tensor, torch.zeros_like(self.tensor))

    def positions(self) -> torch.Tensor:
        """The values as positions: 0 in the rows that are not set, whose values may be beyond."""
        return self.tensor if self.identity else self.zeroed()


@dataclass
class Count:
    """A number read from data, as a 0-d tensor i64 or f64; `full` is its value where all rows are
    selected. `mask` has the rows that it counts, if it is their number."""

    tensor: torch.Tensor
    full: Any = None
    mask: torch.Tensor | None = None


def is_leaf(value: Any) -> bool:
    return isinstance(value, Rows | Count)


def leaves(tree: Any) -> list[Any]:
    return list(pytree.tree_leaves(tree, is_leaf=is_leaf))


def full(tree: Any, length: Any) -> Any:
    """`tree` with all rows instead of selected ones, and `length` instead of numbers of rows."""

    def one(value: Any) -> Any:
        if isinstance(value, Rows):
            return value.tensor
        if isinstance(value, Count):
            return length if value.full is None else value.full
        return value

    return pytree.tree_map(one, tree, is_leaf=is_leaf)


def as_indices(indices: Sequence[Any]) -> list[Any]:
    """The indices with all rows; those that are not set read, or add zeros at, position 0."""
    return [each.positions() if isinstance(each, Rows) else full(each, None) for each in indices]


_TENSOR_OPS: dict[Any, Callable[..., Any]] = {
    torch.sym_max: torch.maximum,
    torch.sym_min: torch.minimum,
    torch.sym_float: lambda a: a.to(torch.float64),
    torch.sym_int: lambda a: a.trunc().to(torch.int64),
    torch.sym_sqrt: lambda a: a.to(torch.float64).sqrt(),
    math.floor: lambda a: a.floor().to(torch.int64),
    math.ceil: lambda a: a.ceil().to(torch.int64),
    operator.floordiv: torch.floor_divide,
    operator.truediv: lambda a, b: a.to(torch.float64) / b.to(torch.float64),
}


_UNORDERED = (torch.sym_max, torch.sym_min)


def count(op: Any, *arguments: Any) -> Count:
    """`op` of numbers, some of which were read from data. Sizes come first where the order is free:
    torch orders Min(4, u0) and Min(u0, S/2) differently, and both are sides of one branch."""
    if op in _UNORDERED:
        arguments = tuple(sorted(arguments, key=lambda value: isinstance(value, Count)))

    def number(value: Any) -> torch.Tensor:
        if isinstance(value, Count):
            return value.tensor
        integer = isinstance(value, bool | int | torch.SymInt)
        return torch.full((), value, dtype=torch.int64 if integer else torch.float64)

    return Count(_TENSOR_OPS.get(op, op)(*map(number, arguments)))


def slice_rows(x: Any, dim: int, start: Any, stop: Any) -> Rows:
    """Rows start to stop of x along dim, where start and stop may be counts."""
    nested = isinstance(x, Rows) and x.axis == dim
    tensor = x.tensor if isinstance(x, Rows) else x
    if isinstance(x, Rows) and not nested:
        raise Unmasked("rows are cut along two axes")
    length = tensor.shape[dim]
    position = x.mask.to(torch.int64).cumsum(0) - 1 if nested else torch.arange(length)
    low, high = (end.tensor if isinstance(end, Count) else end for end in (start, stop))
    mask = (position >= low) & (position < high)
    return Rows(tensor, mask & x.mask if nested else mask, dim, nested and x.identity)
