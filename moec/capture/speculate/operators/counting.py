"""Hooks for counts of class ids, and for the classes that occur among them."""

from __future__ import annotations

from typing import Any

import torch

from moec.capture.speculate.facts.facts import ClassChoice
from moec.capture.speculate.facts.sums import Counts
from moec.capture.speculate.operators.hits import Hits
from moec.capture.speculate.operators.hooks import Hook, Hooks, Trace


def bincount(
    trace: Trace,
    func: Hook,
    ids: torch.Tensor,
    weights: torch.Tensor | None = None,
    minlength: int = 0,
) -> Any:
    """As many counts as there are classes; the length would otherwise depend on data. For ids
    of unknown origin, `minlength` counts: the proof tests that no id is greater."""
    choice = trace.facts.of(ids).choice
    if choice is None and minlength > 0 and ids.ndim == 1:
        choice = ClassChoice(minlength)
        trace.facts.note(ids, choice=choice)
    classes = max(minlength, choice.classes if choice else 0)
    if choice is None or weights is not None:
        return NotImplemented
    return counted(trace, ids, classes)


def counted(trace: Trace, ids: torch.Tensor, classes: int, dtype: torch.dtype = torch.int64) -> Any:
    """How often each class is among the ids, of any shape."""
    choice = trace.facts.of(ids).choice
    counts = (ids.flatten()[:, None] == torch.arange(classes)).sum(0).to(dtype)
    exact = choice is not None and classes == choice.classes
    held = counts.to(torch.int64, copy=True)
    each = trace.facts.of(ids).even == classes
    sums = Counts(held, choice, ids.numel(), each).sums() if exact else None
    return trace.facts.note(counts, sums=sums, truth="count")


def histc(
    trace: Trace, func: Hook, ids: torch.Tensor, bins: int = 100, min: float = 0, max: float = 0
) -> Any:
    """A histogram of class ids with one bin for each class: up to the last, or to their number."""
    choice = trace.facts.of(ids).choice
    if choice is None or ids.ndim != 1 or min != 0 or bins != choice.classes:
        return NotImplemented
    if max not in (bins - 1, bins):
        return NotImplemented
    return counted(trace, ids, bins, ids.dtype)


def unique(
    trace: Trace,
    func: Hook,
    ids: torch.Tensor,
    sorted: bool = True,
    return_inverse: bool = False,
    return_counts: bool = False,
    dim: int | None = None,
) -> Any:
    """All classes, and with the counts those of all classes. Among all classes, the place of an id
    is the id. The proof shows that classes without rows add nothing."""
    choice = trace.facts.of(ids).choice
    if choice is None or dim is not None:
        return NotImplemented
    trace.reads[trace.at()] = None
    results: list[Any] = [Hits(choice.classes)]
    if return_inverse:
        results.append(trace.facts.note(ids.clone(), **vars(trace.facts.of(ids))))
    if return_counts:
        results.append(counted(trace, ids, choice.classes))
    return tuple(results) if len(results) > 1 else results[0]


def unique_consecutive(
    trace: Trace,
    func: Hook,
    ids: torch.Tensor,
    return_inverse: bool = False,
    return_counts: bool = False,
    dim: int | None = None,
) -> Any:
    """As `unique`, for ids in ascending order."""
    if not trace.facts.of(ids).ascending:
        return NotImplemented
    return unique(trace, func, ids, True, return_inverse, return_counts, dim)


COUNTING: Hooks = {
    "bincount": bincount,
    "histc": histc,
    "unique": unique,
    "unique_consecutive": unique_consecutive,
}
