"""Python lists that replace lists of indices whose length depends on data."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from typing import Any

import torch

from moec.errors import CaptureError


class HitIndex(int):
    """A number read from a tensor that still has the methods of a tensor."""

    def item(self) -> builtins.int:
        return builtins.int(self)

    tolist = item

    def _itself(self, *_: Any, **__: Any) -> HitIndex:
        return self

    to = cpu = long = view = reshape = flatten = squeeze = detach = clone = _itself

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def __getitem__(self, index: Any) -> HitIndex:
        return self


class Row(list[Any]):
    """One row of the nonzero of a mask with one axis: a list of one number."""

    def item(self) -> int:
        return int(self[0])

    def __int__(self) -> int:
        return int(self[0])

    __index__ = __int__

    def _squeeze(self, *_: Any, **__: Any) -> HitIndex:
        index: HitIndex = self[0]
        return index

    squeeze = _squeeze

    def _itself(self, *_: Any, **__: Any) -> Row:
        return self

    to = cpu = long = view = reshape = flatten = detach = _itself

    def tolist(self) -> list[Any]:
        return list(self)


class Hits(list[Any]):
    """All indices of a mask of fixed length, instead of those at which it is set: iterating over
    them unrolls the loop. With `column`, each is a row of one number, as nonzero returns them."""

    def __init__(self, count: int, column: bool = False) -> None:
        indices = map(HitIndex, range(count))
        super().__init__(Row([index]) for index in indices) if column else super().__init__(indices)
        self.column = column

    def tolist(self) -> list[Any]:
        return [[row.item()] for row in self] if self.column else list(self)

    def _flat(self, *_: Any, **__: Any) -> Hits:
        return Hits(len(self))

    flatten = squeeze = view = reshape = ravel = _flat

    def _itself(self, *_: Any, **__: Any) -> Hits:
        return self

    to = cpu = long = detach = numpy = contiguous = _itself

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), 1) if self.column else (len(self),)

    def size(self, axis: int | None = None) -> Any:
        return self.shape if axis is None else self.shape[axis]

    def numel(self) -> int:
        return len(self)

    def unbind(self, axis: int = 0) -> list[Any]:
        return list(self)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple) and len(index) == 2 and index[1] == 0:
            return Hits(len(self)) if index[0] == slice(None) else HitIndex(index[0])
        return super().__getitem__(index)


class HitRows(list[Any]):
    """A Python list of row numbers whose length depends on data; as an index it is its tensor."""

    def __init__(self, tensor: torch.Tensor, asks: Callable[[Any], bool]) -> None:
        super().__init__()
        self.tensor = tensor
        self.asks = asks

    def __bool__(self) -> bool:
        return self.asks(self.tensor.shape[0] > 0)

    def __iter__(self) -> Iterator[Any]:
        raise CaptureError("a loop over rows, as many as the data say, cannot be unrolled")

    def __len__(self) -> int:
        raise CaptureError("the length of a list of rows depends on data")

    def __getitem__(self, index: Any) -> Any:
        raise CaptureError("one row of a list that is as long as the data say cannot be read")


def as_tensor(value: Any) -> Any:
    """The tensor of a `HitRows` or of `Hits`; any other value unchanged."""
    if isinstance(value, Hits):
        return torch.arange(len(value)).view(value.shape)
    return value.tensor if isinstance(value, HitRows) else value


def as_slice(value: Any) -> Any:
    """A `Row` as an index: the slice that selects it and keeps its axis; else the value itself."""
    return slice(value.item(), value.item() + 1) if isinstance(value, Row) else value
