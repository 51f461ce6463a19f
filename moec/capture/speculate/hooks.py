"""What the hooks of one trace share.

A hook stands for a function of torch, by the name that torch gives it. It takes the function and
its arguments, and gives a result, or NotImplemented where it has nothing to say: then the function
runs as ever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from moec.capture.speculate.branches import Branches
from moec.capture.speculate.facts import Facts
from moec.capture.speculate.sites import site_of
from moec.capture.speculate.sums import Counts
from moec.capture.speculate.symbols import expression

Hook = Callable[..., Any]
Hooks = Mapping[str, Hook]


@dataclass
class Trace:
    """sizes: the sizes of the inputs and their products, by expression. segments: which class of
    which counts a number read from data is. totals: differences of numbers that are 0, such as
    that of the sum of all counts and the number of rows. buffers: what a buffer that was filled
    piece by piece is by now. listed: the rows of masks. noise: where random numbers were left out.
    reads: where data were read. lengths: those of masks whose loops run for every index; of those
    in `open` the last index stands for no expert. readouts: by symbol, a tensor that holds a number
    read from data.
    """

    branches: Branches
    facts: Facts = field(default_factory=Facts)
    sizes: dict[Any, Any] = field(default_factory=dict)
    segments: dict[Any, tuple[Counts, int]] = field(default_factory=dict)
    totals: set[Any] = field(default_factory=set)
    buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    listed: dict[Any, tuple[Any, ...]] = field(default_factory=dict)
    noise: dict[str, None] = field(default_factory=dict)
    reads: dict[str, None] = field(default_factory=dict)
    readouts: dict[Any, torch.Tensor] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    open: frozenset[int] = frozenset()

    def read(self, number: Any, tensor: torch.Tensor) -> Any:
        """`number`, which Python has read of `tensor` or of the length that it counts."""
        self.readouts.setdefault(expression(number), tensor)
        return number

    def at(self) -> str:
        """The user's line from which a hook is called."""
        frame = self.branches.foreign.nearest(sys._getframe(1))
        site = None if frame is None else site_of(frame)
        return "torch" if site is None else f"{site}: `{site.text}`"

    def written(self, tensor: Any) -> None:
        """Forget what was known of a tensor that is written in place."""
        self.facts.forget(tensor)
        self.listed.pop(id(tensor), None)

    def rows_of(self, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rows of a mask, listed once however often it is an index: two lists would have
        lengths that nothing equates."""
        if id(mask) not in self.listed:
            self.listed[id(mask)] = (mask, self.counted(mask, mask.nonzero(as_tuple=True)))
        rows: tuple[torch.Tensor, ...] = self.listed[id(mask)][1]
        return rows

    def counted(self, mask: torch.Tensor, rows: Any) -> Any:
        """`rows`, which nonzero gave of `mask`: as many as the mask has."""
        first = rows[0] if isinstance(rows, tuple) else rows
        self.read(first.shape[0], (mask != 0).sum())
        return rows
