"""Loops over the experts that some token chose, which torch.export cannot trace.

    expert_hit = (expert_mask.sum(...) > 0).nonzero()
    for expert_idx in expert_hit: ...

How often such a loop runs depends on data. Running it for every expert instead changes
nothing where an expert without tokens adds nothing, as it does in the loops people write; the
capture is compared with the module afterwards, because they could have written something else.
For the same reason an expert may be taken to have tokens where a loop skips those without:

    rows = torch.where(expert_mask[expert_idx])[0]
    if rows.numel() == 0: continue

A condition on a mask (moec.capture.conditions) must besides have been seen to skip its rows
while module and capture agreed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest import mock

import torch

from moec.capture.conditions import Conditions


class _Hits(list[Any]):
    """What `nonzero` gave, as a list of Python numbers: iterating it unrolls the loop."""

    def tolist(self) -> list[Any]:
        return list(self)

    def item(self) -> Any:
        (value,) = self
        return value

    def __int__(self) -> int:
        return int(self.item())

    def flatten(self, *_: Any) -> _Hits:
        return _Hits(hit[0] if isinstance(hit, list) else hit for hit in self)

    squeeze = view = reshape = flatten

    def to(self, *_: Any, **__: Any) -> _Hits:
        return self

    cpu = to

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), 1) if self and isinstance(self[0], list) else (len(self),)

    def size(self, axis: int) -> int:
        return self.shape[axis]

    def numel(self) -> int:
        return len(self)


@dataclass
class Met:
    """What a capture met: the lengths of masks whose loops were run for every index, whether
    rows were taken to be there, and the conditions that were taken to hold."""

    lengths: list[int] = field(default_factory=list)
    rows: bool = False
    conditions: Conditions = field(default_factory=lambda: Conditions(assumed=True))

    def __bool__(self) -> bool:
        return self.rows or bool(self.lengths) or bool(self.conditions.met)


@contextmanager
def every_expert_hit(last: Collection[int] = ()) -> Iterator[Met]:
    """While open, `nonzero` of a mask over a known number of things finds all of them, and
    finds at least one row where the number depends on data.

    Of masks whose length is in `last`, the last index is left out: nothing can be there.
    """
    nonzero, where = torch.Tensor.nonzero, torch.where
    met = Met()

    def found(rows: torch.Tensor) -> None:
        if isinstance(rows.shape[0], torch.SymInt):
            torch._check(rows.shape[0] >= 1)
            met.rows = True

    @wraps(nonzero)  # torch names a function to its modes by how it is found now
    def hits(self: torch.Tensor, *, as_tuple: bool = False) -> Any:
        known = self.ndim == 1 and type(self.shape[0]) is int
        if not as_tuple and known and self.dtype is torch.bool:
            length = self.shape[0]
            met.lengths.append(length)
            return _Hits(_Hits([index]) for index in range(length - (length in last)))
        result: Any = nonzero(self, as_tuple=True) if as_tuple else nonzero(self)
        found(result[0] if as_tuple else result)
        return result

    @wraps(where)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        result = where(*args, **kwargs)
        if isinstance(result, tuple):
            found(result[0])
        return result

    with (
        mock.patch.object(torch.Tensor, "nonzero", hits),
        mock.patch.object(torch, "where", chosen),
        met.conditions,
    ):
        yield met
