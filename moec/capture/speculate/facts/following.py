"""Rules by which facts about tensors propagate through operations."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moec.capture.speculate.facts.facts import NOTHING, Facts, Order
from moec.capture.speculate.facts.sum_rules import (
    Rule,
    hot_sum,
    known_comparison,
    note_picked,
    own_counts,
    sum_rule,
    usual_comparison,
)
from moec.capture.speculate.facts.sums import ClassChoice
from moec.capture.speculate.facts.symbols import expression

_VIEWS = (
    "view reshape flatten unsqueeze squeeze to long int cpu clone contiguous detach ravel float "
    "type view_as expand type_as int64 int32 double data"
).split()
_PARTS = "getitem select index_select narrow chunk split unbind".split()
_MOVED = "t T mT transpose permute swapaxes movedim".split()
_COLUMNS = "view reshape unsqueeze getitem expand expand_as repeat to long contiguous clone".split()


def follow(
    facts: Facts, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> None:
    """Note the facts of `result`, which the function `name` computed from `args`."""
    rule = _RULES.get(name)
    if args and isinstance(args[0], torch.Tensor):
        if rule is not None:
            rule(facts, args, kwargs, result)
        if name in _COLUMNS:
            _columns(facts, args, kwargs, result)


def _dim(args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, default: Any) -> Any:
    value = kwargs.get("dim", args[position] if len(args) > position else default)
    return value if type(value) is int or value is default else default


def _chosen(position: int, default: int | None, distinct: bool) -> Rule:
    """The rule of topk, sort and argmax: the indices are a choice among the entries of the axis."""

    def rule(facts: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        index = result[1] if isinstance(result, tuple) else result
        first, dim = args[0], _dim(args, kwargs, position, default)
        if dim is None or not isinstance(index, torch.Tensor):
            return
        choice = facts.of(first).choice
        if choice is not None and isinstance(result, tuple):
            facts.note(result[0], choice=choice, high=facts.of(first).high)
        if choice is not None and first.ndim == 1 and distinct:
            choice.sorted = first
            facts.note(index, order=Order(choice, lambda rows: rows))
            return
        size = first.shape[dim] if first.ndim else 1
        if isinstance(size, int):
            facts.note(index, choice=ClassChoice(size), high=size - 1, distinct=distinct)
            if distinct and index.shape[dim] is size:
                facts.note(index, even=size)

    return rule


_along = _chosen(1, None, distinct=False)


def _extreme(facts: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
    """max along an axis yields a choice; max of all values keeps their upper bound."""
    high = facts.of(args[0]).high
    if isinstance(result, torch.Tensor) and high is not None and len(args) == 1:
        facts.note(result, high=high, greatest=high)
    _along(facts, args, kwargs, result)


def _columns(facts: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
    """Rows [n] as a column [n, 1], and the column repeated along the features [n, D]."""
    if not isinstance(result, torch.Tensor) or result.ndim != 2:
        return
    first = args[0]
    if first.ndim == 1 and isinstance(result.shape[1], int) and result.shape[1] == 1:
        facts.note(result, column=first)
    elif first.ndim == 2 and facts.of(first).column is not None:
        facts.note(result, column=facts.of(first).column)


def _view(facts: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
    fact = facts.of(args[0])
    if fact is NOTHING or not isinstance(result, torch.Tensor):
        return
    if list(map(expression, result.shape)) != list(map(expression, args[0].shape)):
        fact = replace(
            fact, distinct=False, ascending=False, order=None, single=None, member=None, sums=None
        )
        fact = replace(fact, column=None, elements=None)
        fact = replace(fact, hot=fact.hot if _same_classes(args[0], result) else None)
    if result.dtype != args[0].dtype:
        fact = replace(fact, elements=None)
        if result.is_floating_point() or result.dtype == torch.bool:
            fact = replace(fact, even=None)
    facts.note(result, **vars(replace(fact, piece=None, pieces=None)))


def _same_classes(before: torch.Tensor, after: torch.Tensor) -> bool:
    classes = before.shape[-1] if before.ndim else None
    return type(classes) is int and after.ndim > 1 and after.shape[-1] is classes


def _sum(facts: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
    first = args[0]
    fact, dim = facts.of(first), _dim(args, kwargs, 1, None)
    facts.note(result, truth="count", positive=fact.positive)
    sums = fact.sums
    if sums is not None and sums.counts is not None and not result.ndim:
        every = np.array_equal(sums.matrix, sums.counts.sums().matrix)
        facts.note(result, size=sums.counts.total if every else None)
    high = 1 if first.dtype == torch.bool else fact.high
    if high is not None and isinstance(dim, int):
        single = fact.single is not None and fact.single == dim % first.ndim
        facts.note(result, high=1 if single else high * first.shape[dim])
    if fact.hot is not None and isinstance(result, torch.Tensor) and result.ndim:
        hot_sum(
            facts, fact.hot, kwargs.get("dim", args[1] if len(args) > 1 else None), args[0], result
        )


def _cumsum(facts: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
    first = args[0]
    fact, dim = facts.of(first), _dim(args, kwargs, 1, None)
    high = 1 if first.dtype == torch.bool else fact.high
    if high is not None and isinstance(dim, int):
        facts.note(result, high=high * first.shape[dim])
    sums = fact.sums or own_counts(first)
    if sums is not None and dim in (0, -1):
        facts.note(result, sums=sums.so_far())


def _all_rules(*rules: Rule) -> Rule:
    def rule(facts: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        for each in rules:
            each(facts, args, kwargs, result)

    return rule


def _arithmetic(combine: Callable[[Any, Any], Any]) -> Rule:
    """The upper bound of the result of an operation on numbers that are not negative."""

    def rule(facts: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        other = args[1] if len(args) > 1 else 0
        high = facts.of(args[0]).high
        more = facts.of(other).high if isinstance(other, torch.Tensor) else other
        if high is None or more is None or isinstance(more, float | bool | torch.SymFloat):
            return
        if not isinstance(other, torch.Tensor) and not (isinstance(other, int) and other >= 0):
            return
        facts.note(result, high=combine(high, more))

    return rule


def _any(facts: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
    facts.note(result, truth="some", positive=facts.of(args[0]).positive)


_SOME = ("gt", "ge", "ne", "greater", "greater_equal", "not_equal")
_NONE = ("eq", "lt", "le", "less", "less_equal")


def _compared(name: str) -> Rule:
    def rule(facts: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        facts.note(result, always=known_comparison(facts, name, args))
        usual = usual_comparison(facts, name, args)
        if usual is not None:
            facts.note(result, truth="some" if usual else "none")
        elif facts.of(args[0]).truth == "count":
            facts.note(result, truth="some" if name in _SOME else "none")

    return rule


_OPPOSITE = {"some": "none", "none": "some"}


def _not(facts: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
    truth = _OPPOSITE.get(str(facts.of(args[0]).truth))
    if truth is not None:
        facts.note(result, truth=truth)


def _part(facts: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
    """A part of a tensor, or its values in another order: facts about every value still hold."""
    fact = facts.of(args[0])
    if fact.sums is not None:
        note_picked(facts, fact.sums, args, kwargs, result)
    for part in result if isinstance(result, tuple) else (result,):
        if fact is not NOTHING and isinstance(part, torch.Tensor):
            facts.note(part, truth=fact.truth, choice=fact.choice, high=fact.high)
    cut = args[1:] if len(args) != 2 or not isinstance(args[1], tuple) else args[1]
    sliced = fact.even is not None and cut and all(isinstance(part, slice) for part in cut)
    if sliced and result.shape == args[0].shape:  # sizes that are compared are a guard
        facts.note(result, even=fact.even)


def _moved(facts: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
    """All values of a tensor, with its axes in another order."""
    _part(facts, args, kwargs, result)
    fact = facts.of(args[0])
    if fact.even is not None or fact.positive:
        facts.note(result, even=fact.even, positive=fact.positive)


def _ordered(op: Callable[[Any, Any], Any]) -> Rule:
    """`order // k` and `order % k`: functions of an order are marked with that order again."""

    def rule(facts: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        order, number = facts.of(args[0]).order, args[1]
        if order is not None and isinstance(number, int):
            recipe = order.recipe
            facts.note(result, order=Order(order.choice, lambda rows: op(recipe(rows), number)))
        if op is operator.mod and isinstance(number, int) and number > 0 and order is None:
            facts.note(result, choice=ClassChoice(number), high=number - 1)

    return rule


_RULES: dict[str, Rule] = {
    "topk": _chosen(2, -1, distinct=True),
    "sort": _chosen(1, -1, distinct=True),
    "argsort": _chosen(1, -1, distinct=True),
    "argmax": _along,
    "argmin": _along,
    "max": _extreme,
    "min": _along,
    "sum": _sum,
    "count_nonzero": _sum,
    "cumsum": _cumsum,
    "mul": _arithmetic(operator.mul),
    "add": _all_rules(_arithmetic(operator.add), sum_rule(1)),
    "radd": sum_rule(1),
    "sub": _all_rules(_arithmetic(lambda high, _: high), sum_rule(-1)),
    "subtract": sum_rule(-1),
    "clamp": _arithmetic(lambda high, _: high),
    "any": _any,
    "logical_not": _not,
    "invert": _not,
    "bitwise_not": _not,
    **{name: _part for name in _PARTS},
    **{name: _moved for name in _MOVED},
    **{name: _view for name in _VIEWS},
    **{name: _compared(name) for name in (*_SOME, *_NONE)},
    **{name: _ordered(operator.floordiv) for name in ("floordiv", "floor_divide", "div")},
    **{name: _ordered(operator.mod) for name in ("mod", "remainder")},
}
