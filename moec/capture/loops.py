"""Loops over the experts that some token chose, which torch.export cannot trace.

    expert_hit = (expert_mask.sum(...) > 0).nonzero()
    for expert_idx in expert_hit: ...

How often such a loop runs depends on data. Running it for every expert instead changes
nothing where an expert without tokens adds nothing, as it does in the loops people write; the
capture is compared with the module afterwards, because they could have written something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


class _Hits(list[Any]):
    """What `nonzero` gave, as a list of Python numbers: iterating it unrolls the loop."""

    def tolist(self) -> list[Any]:
        return list(self)

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


@contextmanager
def every_expert_hit() -> Iterator[list[int]]:
    """While open, `nonzero` of a mask over a known number of things finds all of them.

    The list that is given fills with the length of each mask that was met.
    """
    original = torch.Tensor.nonzero
    met: list[int] = []

    def nonzero(self: torch.Tensor, **options: Any) -> Any:
        known = self.ndim == 1 and type(self.shape[0]) is int
        if options or not known or self.dtype is not torch.bool:
            return original(self, **options)
        met.append(self.shape[0])
        return _Hits(_Hits([index]) for index in range(self.shape[0]))

    with mock.patch.object(torch.Tensor, "nonzero", nonzero):
        yield met
