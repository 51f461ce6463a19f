"""Tensors whose values are sums of counts, such as starts and ends of each expert's sorted rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_MANY = 10**6
MOST_NUMBERS = 4096
"""The longest tensor whose values are tracked; it has about one value for each expert."""


@dataclass(eq=False)
class ClassChoice:
    """A choice among `classes`, such as each token's choice among the experts.

    `sorted` are the flat ids whose sort order is used. `rows` has, by class, the rows of the tokens
    that chose it.
    """

    classes: int
    sorted: torch.Tensor | None = None
    rows: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class Counts:
    """The values of a tensor [n]; `numbers` are these values once Python has read them.

    With a `choice`, they are how often each of its classes is chosen, `total` times in all, and
    each of them at least once if `positive`.
    """

    tensor: torch.Tensor
    choice: ClassChoice | None = None
    total: Any = None
    positive: bool = False
    numbers: list[Any] = field(default_factory=list)

    def sums(self) -> Sums:
        count = self.tensor.shape[0]
        return Sums(self, np.eye(count, count + 1, 1, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Sums:
    """`matrix @ [1, *counts]` with an integer matrix [n, 1 + counts], or one row of it for a 0-d
    tensor. Without counts, the matrix has one column and the values are constants."""

    counts: Counts | None
    matrix: npt.NDArray[np.int64]

    def values(self, numbers: Sequence[Any]) -> Any:
        """The values (one number for a 0-d tensor) where the counts are `numbers`."""
        if self.matrix.ndim > 1:
            return [Sums(self.counts, row).values(numbers) for row in self.matrix]
        first, *factors = map(int, self.matrix)
        parts = [n if f == 1 else f * n for f, n in zip(factors, numbers, strict=True) if f]
        if not parts:
            return first
        return sum(parts, first) if first else sum(parts[1:], parts[0])

    def sign(self) -> int:
        """1 or -1 if a 0-d value has that sign wherever all counts are positive, else 0."""
        first, *factors = map(int, self.matrix)
        for sign in (1, -1):
            if min(sign * first, *(sign * f for f in factors)) >= 0 and any(factors):
                return sign
        return 0

    def usual(self) -> Any:
        """The values where every count is large and no two are equal."""
        return self.values([_MANY + 1009 * i for i in range(self.matrix.shape[-1] - 1)])

    def picked(self, index: Any) -> Sums | None:
        """The sums at an index or slice of the first axis; None for any other index."""
        if self.matrix.ndim < 2 or not _is_plain(index):
            return None
        return Sums(self.counts, self.matrix[index])

    def so_far(self) -> Sums:
        return Sums(self.counts, self.matrix.cumsum(0))

    def replaced(self, index: Any, other: Sums) -> Sums | None:
        """These sums with `other` written at an index or slice of the first axis; None where that
        is not possible."""
        both = aligned([self, other])
        if both is None or self.matrix.ndim < 2 or not _is_plain(index):
            return None
        matrix = both[0].matrix.copy()
        if matrix[index].shape != both[1].matrix.shape:
            return None
        matrix[index] = both[1].matrix
        return Sums(both[0].counts, matrix)


def constants(values: int | Sequence[int]) -> Sums:
    return Sums(None, np.array(values, dtype=np.int64)[..., None])


def aligned(items: Sequence[Sums]) -> list[Sums] | None:
    """The items over one common list of counts; None where they are sums of different counts."""
    counts = {id(item.counts): item.counts for item in items if item.counts is not None}
    if len(counts) > 1:
        return None
    shared = next(iter(counts.values()), None)
    width = 1 if shared is None else 1 + shared.tensor.shape[0]
    return [Sums(shared, _widened(item.matrix, width)) for item in items]


def joined(items: Sequence[Sums]) -> Sums | None:
    """The items concatenated."""
    lists = aligned(items)
    if lists is None or any(item.matrix.ndim < 2 for item in lists):
        return None
    return Sums(lists[0].counts, np.concatenate([item.matrix for item in lists]))


def added(one: Sums, other: Sums, factor: int) -> Sums | None:
    """one + factor * other, element by element; None for different counts or shapes."""
    both = aligned([one, other])
    if both is None:
        return None
    first, second = both[0].matrix, factor * both[1].matrix
    if first.ndim == second.ndim == 2 and first.shape != second.shape:
        return None
    return Sums(both[0].counts, first + second)


def _widened(matrix: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.int64]:
    more = [(0, 0)] * (matrix.ndim - 1) + [(0, width - matrix.shape[-1])]
    return np.pad(matrix, more)


def _is_plain(index: Any) -> bool:
    """Whether an index is an int, or a slice of ints."""
    parts = (index.start, index.stop, index.step) if isinstance(index, slice) else (index,)
    sliced = isinstance(index, slice)
    return all(type(part) is int or (sliced and part is None) for part in parts)
