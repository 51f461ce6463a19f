"""Values of tensors as Python numbers; reading a value again gives the same number."""

from __future__ import annotations

from typing import Any

import torch

from moec.capture.speculate.facts.sums import Sums
from moec.capture.speculate.facts.symbols import expression
from moec.capture.speculate.operators.hooks import Trace
from moec.torch_private import check


def number(trace: Trace, tensor: torch.Tensor) -> Any:
    """The value of a tensor of one element."""
    fact = trace.facts.of(tensor)
    if fact.size is not None:
        return fact.size
    if fact.greatest is not None:
        return fact.greatest
    if fact.sums is not None and fact.sums.matrix.ndim == 1:
        return _values(trace, fact.sums)
    return trace.read(tensor.item(), tensor, fact.positive)


def numbers(trace: Trace, tensor: torch.Tensor) -> list[Any]:
    """The values of a tensor [n] of fixed length n."""
    sums = trace.facts.of(tensor).sums
    if sums is not None:
        values: list[Any] = _values(trace, sums)
        return values
    return _elements(trace, tensor)


def as_number(trace: Trace, value: Any) -> Any:
    """The number in a 0-d integer tensor; any other value unchanged."""
    if not isinstance(value, torch.Tensor) or value.ndim or value.is_floating_point():
        return value
    trace.reads[trace.at()] = None
    return number(trace, value)


def _values(trace: Trace, sums: Sums) -> Any:
    counts = sums.counts
    if counts is None:
        return sums.values([])
    if not counts.numbers:
        counts.numbers = _elements(trace, counts.tensor, counts.positive)
        trace.segments |= {expression(n): (counts, i) for i, n in enumerate(counts.numbers)}
        if counts.total is not None:
            trace.totals[expression(sum(counts.numbers, 0))] = counts.total
    return sums.values(counts.numbers)


def _elements(trace: Trace, tensor: torch.Tensor, positive: bool = False) -> list[Any]:
    """The values as numbers. They are cached: a second reading would create other symbols, which
    are not known to be equal."""
    already = trace.facts.of(tensor).elements
    if already is not None:
        return list(already)
    parts = [tensor[index] for index in range(int(tensor.shape[0]))]
    values = [trace.read(part.item(), part, positive) for part in parts]
    if not tensor.is_floating_point():
        for value in values:
            check(value >= 0)
    trace.facts.note(tensor, elements=tuple(values))
    return values
