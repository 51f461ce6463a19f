"""Rules by which sums of counts propagate through operations."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moec.capture.speculate.facts.facts import Facts
from moec.capture.speculate.facts.sums import (
    MOST_NUMBERS,
    ClassChoice,
    Counts,
    Sums,
    added,
    constants,
)

Rule = Callable[[Facts, tuple[Any, ...], Mapping[str, Any], Any], None]


def hot_sum(
    facts: Facts,
    hot: tuple[ClassChoice, Any, bool],
    dims: Any,
    first: torch.Tensor,
    result: torch.Tensor,
) -> None:
    """For one-hot rows: the sum over all axes but the last is how often each class is chosen."""
    axes = [dims] if isinstance(dims, int) else list(dims or ())
    if not axes or any(axis % first.ndim == first.ndim - 1 for axis in axes):
        return
    if result.ndim > 1:
        facts.note(result, hot=hot)
    else:
        facts.note(result, sums=Counts(result.clone(), *hot).sums())


def own_counts(tensor: torch.Tensor) -> Sums | None:
    """A short integer tensor of fixed length without facts is taken for counts of its own."""
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.dtype == torch.bool:
        return None
    length = tensor.shape[0]
    if type(length) is not int or not 0 < length <= MOST_NUMBERS:
        return None
    return Counts(tensor.clone()).sums()


def sum_rule(factor: int) -> Rule:
    """The rule of a + factor * b, where both are sums of counts or integers."""

    def rule(facts: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        if len(args) < 2 or kwargs:
            return
        one, other = (_as_sums(facts, value) for value in args[:2])
        if one is not None and other is not None:
            facts.note(result, sums=added(one, other, factor))

    return rule


def _as_sums(facts: Facts, value: Any) -> Sums | None:
    return constants(value) if type(value) is int else facts.of(value).sums


def note_picked(
    facts: Facts, sums: Sums, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> None:
    if isinstance(result, tuple):  # unbind
        for number, part in enumerate(result):
            if part.ndim == 0:
                facts.note(part, sums=sums.picked(number))
        return
    index = args[-1]
    index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    part = None if kwargs else sums.picked(index)
    if part is not None and part.matrix.shape[:-1] == tuple(result.shape):
        facts.note(result, sums=part)


_OPERATORS = {
    **{name: getattr(operator, name) for name in ("gt", "ge", "ne", "eq", "lt", "le")},
    "greater": operator.gt,
    "greater_equal": operator.ge,
    "not_equal": operator.ne,
    "less": operator.lt,
    "less_equal": operator.le,
}


_OF_POSITIVE = {("eq", 0): False, ("ne", 0): True, ("gt", 0): True, ("le", 0): False}
_OF_POSITIVE |= {("lt", 1): False, ("ge", 1): True, ("greater", 0): True, ("not_equal", 0): True}
_OF_POSITIVE |= {("less_equal", 0): False, ("less", 1): False, ("greater_equal", 1): True}


def known_comparison(facts: Facts, name: str, args: tuple[Any, ...]) -> bool | None:
    """The result of comparing a number that is positive wherever there are rows, or sums of such
    counts; None where it depends on data."""
    one, other = (*args, None)[:2]
    if facts.of(one).positive and one.ndim == 0 and type(other) is int:
        return _OF_POSITIVE.get((name, other))
    left, right = _as_sums(facts, one), _as_sums(facts, other)
    difference = None if left is None or right is None else added(left, right, -1)
    if difference is None or difference.counts is None or difference.matrix.ndim > 1:
        return None
    sign = difference.sign() if difference.counts.positive else 0
    return bool(_OPERATORS[name](sign, 0)) if sign else None


def usual_comparison(facts: Facts, name: str, args: tuple[Any, ...]) -> bool | None:
    """The result of comparing two sums of counts where every count is large."""
    one, other = (_as_sums(facts, value) for value in (*args, None)[:2])
    difference = None if one is None or other is None else added(one, other, -1)
    if difference is None or difference.counts is None or difference.matrix.ndim > 1:
        return None
    return bool(_OPERATORS[name](difference.usual(), 0))
