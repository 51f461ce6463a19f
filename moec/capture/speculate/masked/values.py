"""What stands in the masked form for rows that data choose, and for numbers read from data."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


class Unmasked(Exception):
    """The program does with rows what a mask cannot express. The message says what."""


@dataclass
class Rows:
    """Of `tensor` along `axis` those rows that `mask` has, in order. `identity`: the values are
    the places of all rows, so that reading by them leaves every row where it is."""

    tensor: torch.Tensor
    mask: torch.Tensor
    axis: int = 0
    identity: bool = False

    def zeroed(self) -> torch.Tensor:
        """The tensor with zeros in the rows that are not there; whatever stood there."""
        shape = [1] * self.tensor.ndim
        shape[self.axis] = -1
        return torch.where(self.mask.view(shape), self.tensor, torch.zeros_like(self.tensor))


@dataclass
class Count:
    """A number read from data, as a 0-d tensor; `full` is the length where all rows are there."""

    tensor: torch.Tensor
    full: Any = None


def is_leaf(value: Any) -> bool:
    return isinstance(value, Rows | Count)


def leaves(tree: Any) -> list[Any]:
    return pytree.tree_leaves(tree, is_leaf=is_leaf)


def full(tree: Any, length: Any) -> Any:
    """`tree` with all rows in the place of some, and `length` in that of numbers of rows."""

    def one(value: Any) -> Any:
        if isinstance(value, Rows):
            return value.tensor
        if isinstance(value, Count):
            return length if value.full is None else value.full
        return value

    return pytree.tree_map(one, tree, is_leaf=is_leaf)


_TENSOR_OPS: dict[Any, Callable[[Any, Any], Any]] = {
    torch.sym_max: torch.maximum,
    torch.sym_min: torch.minimum,
    operator.floordiv: torch.floor_divide,
}


def count(op: Any, *arguments: Any) -> Count:
    """`op` of numbers, some of which were read from data."""

    def number(value: Any) -> torch.Tensor:
        if isinstance(value, Count):
            return value.tensor
        return torch.full((), value, dtype=torch.int64)

    return Count(_TENSOR_OPS.get(op, op)(*map(number, arguments)))


def between(x: Any, dim: int, start: Any, stop: Any) -> Rows:
    """Rows start to stop of x along dim, where those may be counts."""
    nested = isinstance(x, Rows) and x.axis == dim
    tensor = x.tensor if isinstance(x, Rows) else x
    if isinstance(x, Rows) and not nested:
        raise Unmasked("rows are cut along two axes")
    length = tensor.shape[dim]
    position = x.mask.to(torch.int64).cumsum(0) - 1 if nested else torch.arange(length)
    low, high = (end.tensor if isinstance(end, Count) else end for end in (start, stop))
    mask = (position >= low) & (position < high)
    return Rows(tensor, mask & x.mask if nested else mask, dim, nested and x.identity)
