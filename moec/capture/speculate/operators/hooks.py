"""The state that the hooks of one trace share.

A hook replaces a function of torch, by the name of that function. It receives the trace, the
function and its arguments and returns a result, or NotImplemented where the original function is to
run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from moec.capture.speculate.branches import Branches
from moec.capture.speculate.facts.facts import Facts
from moec.capture.speculate.facts.sums import Counts
from moec.capture.speculate.facts.symbols import expression, reads_data
from moec.capture.user_code.sites import site_of

Hook = Callable[..., Any]
Hooks = Mapping[str, Hook]


@dataclass
class Filling:
    """A buffer that is being filled from its first row on: the row reached, and its pieces."""

    stop: Any = 0
    parts: list[torch.Tensor] = field(default_factory=list)


@dataclass
class Trace:
    """The state of one trace.

    sizes: the symbolic sizes of the inputs and their products, by expression.
    cuts: sizes at which the code cuts rows, such as a capacity, by expression.
    segments: for a number read from data, its counts and which of them it is.
    totals: by expression, a sum of numbers read from data, such as that of all counts, and the
        size that it is equal to, such as the number of rows.
    buffers: by id, a buffer that was filled piece by piece, and its contents.
    filling: by id, a buffer that is being filled piece by piece.
    listed: the rows of masks, by the id of the mask.
    noise: the lines where random numbers were left out.
    reads: the lines where data were read into Python.
    readouts: by symbol, a tensor that holds the number read from data.
    lengths: the lengths of masks whose loops run for every index.
    open: those lengths of which the last index belongs to no expert.
    by_class: whether rows of a sorted choice, between the ends of a class, are listed as the rows
        of that class. Otherwise they are pieces of a split.
    lists_classes: whether such rows were listed.
    """

    branches: Branches
    facts: Facts = field(default_factory=Facts)
    sizes: dict[Any, Any] = field(default_factory=dict)
    cuts: dict[Any, Any] = field(default_factory=dict)
    segments: dict[Any, tuple[Counts, int]] = field(default_factory=dict)
    totals: dict[Any, Any] = field(default_factory=dict)
    buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    filling: dict[int, Filling] = field(default_factory=dict)
    listed: dict[Any, tuple[Any, ...]] = field(default_factory=dict)
    noise: dict[str, None] = field(default_factory=dict)
    reads: dict[str, None] = field(default_factory=dict)
    readouts: dict[Any, torch.Tensor] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    open: frozenset[int] = frozenset()
    by_class: bool = True
    lists_classes: bool = False

    def read(self, number: Any, tensor: torch.Tensor, positive: bool = False) -> Any:
        """Returns `number`, after recording that Python read it from `tensor`, or that it is the
        length that `tensor` counts, and whether it is positive wherever there are rows."""
        if positive and expression(number).is_Symbol:
            self.branches.positive.add(expression(number))
        self.readouts.setdefault(expression(number), tensor)
        return number

    def total(self, size: Any) -> Any:
        """The size of the inputs that `size` is equal to, if it is a sum of numbers read from data
        for which that is known; otherwise `size`."""
        return self.totals.get(expression(size), size)

    def equal(self, one: Any, other: Any) -> bool:
        """Whether two sizes are known to be equal."""
        return bool(expression(self.total(one)) == expression(self.total(other)))

    def is_zero(self, size: Any) -> bool:
        """Whether a size is the difference of a sum of numbers read from data and what it is."""
        if not reads_data(size):
            return False
        difference = expression(size)
        return any(expression(total) - difference == part for part, total in self.totals.items())

    def at(self) -> str:
        """The user's line from which a hook is called."""
        frame = self.branches.foreign.nearest(sys._getframe(1))
        site = None if frame is None else site_of(frame)
        return "torch" if site is None else f"{site}: `{site.text}`"

    def written(self, tensor: Any) -> None:
        """Removes what is known of a tensor that is written in place."""
        self.facts.forget(tensor)
        self.listed.pop(id(tensor), None)

    def rows_of(self, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rows of a mask, computed once even if it is used as an index repeatedly: each nonzero
        would have a length of its own that is not known to be equal."""
        if id(mask) not in self.listed:
            self.listed[id(mask)] = (mask, self.counted(mask, mask.nonzero(as_tuple=True)))
        rows: tuple[torch.Tensor, ...] = self.listed[id(mask)][1]
        return rows

    def counted(self, mask: torch.Tensor, rows: Any) -> Any:
        """Returns `rows`, the nonzero of `mask`, after recording that the mask's sum is their
        number."""
        first = rows[0] if isinstance(rows, tuple) else rows
        self.read(first.shape[0], (mask != 0).sum(), self.facts.of(mask).positive)
        return rows
