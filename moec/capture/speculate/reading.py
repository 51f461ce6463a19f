"""Hooks for data that Python reads: counts, class ids, lists of rows, numpy arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from moec.capture.speculate.facts import Counts
from moec.capture.speculate.hits import HitRows, Hits, as_tensor
from moec.capture.speculate.hooks import Hook, Hooks, Trace
from moec.capture.speculate.python_numbers import integer_of
from moec.capture.speculate.symbols import expression, is_symbolic, reads_data
from moec.errors import CaptureError


def reading_hooks(trace: Trace) -> Hooks:
    facts = trace.facts

    def bincount(
        func: Hook, ids: torch.Tensor, weights: torch.Tensor | None = None, minlength: int = 0
    ) -> Any:
        """As many counts as there are classes: how many else depends on data."""
        choice = facts.of(ids).choice
        classes = max(minlength, choice.classes if choice else 0)
        if choice is None or weights is not None:
            return NotImplemented
        counts = (ids[:, None] == torch.arange(classes)).sum(0)
        exact = classes == choice.classes
        return facts.note(
            counts, counts=Counts(choice, ids.numel()) if exact else None, truth="count"
        )

    def unique(func: Hook, ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Every class: that those without rows add nothing is proved."""
        choice = facts.of(ids).choice
        if choice is None or args or kwargs.get("return_counts") or kwargs.get("return_inverse"):
            return NotImplemented
        trace.reads[trace.at()] = None
        return Hits(choice.classes)

    def one_hot(func: Hook, ids: torch.Tensor, num_classes: int = -1) -> Any:
        fact = facts.of(ids)
        if isinstance(num_classes, int) and num_classes < 0:
            if fact.choice is None:
                return NotImplemented
            num_classes = fact.choice.classes
        hot = (ids[..., None] == torch.arange(num_classes)).to(torch.int64)
        if reads_data(num_classes):
            return facts.note(hot, one_hot_of=ids)
        return facts.note(hot, high=1, single=hot.ndim - 2 if fact.distinct else None)

    def nonzero(func: Hook, mask: torch.Tensor, *, as_tuple: bool = False) -> Any:
        """Where a mask over a fixed number of things is set: at each of them."""
        fact = facts.of(mask)
        if mask.ndim == 1 and type(mask.shape[0]) is int and fact.truth in ("some", "count"):
            trace.reads[trace.at()] = None
            trace.lengths.append(mask.shape[0])
            hits = Hits(mask.shape[0] - (mask.shape[0] in trace.open), column=not as_tuple)
            return (hits,) if as_tuple else hits
        if isinstance(mask, torch.Tensor) and mask.ndim:
            return trace.counted(mask, func(mask, as_tuple=as_tuple) if as_tuple else func(mask))
        return NotImplemented

    def where(func: Hook, mask: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
        return NotImplemented if rest or kwargs else nonzero(torch.nonzero, mask, as_tuple=True)

    def elements(tensor: torch.Tensor) -> list[Any]:
        """The values as numbers: the same ones each time, lest nothing equates them."""
        already = facts.of(tensor).elements
        if already is not None:
            return list(already)
        parts = [tensor[index] for index in range(int(tensor.shape[0]))]
        values = [trace.read(part.item(), part) for part in parts]
        if not tensor.is_floating_point():
            for value in values:
                torch._check(value >= 0)  # type: ignore[no-untyped-call]
        facts.note(tensor, elements=tuple(values))
        return values

    def numbers(tensor: torch.Tensor) -> list[Any]:
        fact = facts.of(tensor)
        counts = fact.counts or fact.ends
        if counts is None:
            return elements(tensor)
        if not counts.numbers:
            counts.numbers = elements(tensor) if fact.counts else _steps(elements(tensor))
            trace.segments |= {expression(n): (counts, i) for i, n in enumerate(counts.numbers)}
            trace.totals.add(expression(sum(counts.numbers, 0) - counts.total))
        if fact.counts:
            return list(counts.numbers)
        return [sum(counts.numbers[: i + 1], 0) for i in range(len(counts.numbers))]

    def tolist(func: Hook, tensor: torch.Tensor) -> Any:
        trace.reads[trace.at()] = None
        if tensor.ndim == 0:
            return item(func, tensor)
        if reads_data(tensor.shape[0]):
            if tensor.ndim > 1:
                raise CaptureError("rows of several numbers each, as many as the data say")
            return HitRows(tensor, lambda condition: bool(condition))
        if not isinstance(tensor.shape[0], int):
            return NotImplemented
        if tensor.ndim == 1:
            return numbers(tensor)
        return [tolist(func, row) for row in tensor]

    def numpy(func: Hook, tensor: torch.Tensor, *_: Any, **__: Any) -> Any:
        if not all(isinstance(size, int) for size in tensor.shape):
            return NotImplemented
        array = np.empty(tuple(tensor.shape), dtype=object)
        values = tolist(func, tensor)
        array[...] = values
        return array

    def item(func: Hook, tensor: torch.Tensor) -> Any:
        trace.reads[trace.at()] = None
        fact = facts.of(tensor)
        if fact.size is not None:
            return fact.size
        if fact.greatest is not None:
            return fact.greatest
        return trace.read(tensor.item(), tensor)

    def truth(func: Hook, tensor: torch.Tensor) -> Any:
        return trace.branches.ask(tensor, facts.of(tensor).truth != "none")

    def tensor(func: Hook, value: Any, *args: Any, **kwargs: Any) -> Any:
        """A size in a tensor stays known; a list of rows is the tensor that it came from."""
        if isinstance(value, HitRows):
            return as_tensor(value).to(kwargs.get("dtype") or torch.int64)
        if is_symbolic(value):
            return facts.note(torch.zeros((), dtype=kwargs.get("dtype")), size=value)
        if isinstance(value, list | tuple) and any(map(reads_data, value)):
            return of_numbers(value, kwargs.get("dtype") or torch.int64)
        result = func(value, *args, **kwargs)
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return facts.note(result, size=value) if plain else result

    def compared(func: Hook, a: Any, b: Any) -> Any:
        """A float of an integer compares as that integer, which has an expression of its own."""
        if integer_of(a) is a and integer_of(b) is b:
            return NotImplemented
        return func(integer_of(a), integer_of(b))

    def of_numbers(values: Sequence[Any], dtype: torch.dtype) -> Any:
        """A tensor of numbers that Python has read, from the tensors that it read them of."""
        parts = [trace.readouts.get(expression(value)) for value in values]
        parts = [v if part is None else part for part, v in zip(parts, values, strict=True)]
        if any(map(reads_data, parts)):
            return NotImplemented
        return torch.stack([torch.as_tensor(part).reshape(()).to(dtype) for part in parts])

    def new_tensor(func: Hook, like: torch.Tensor, value: Any, **kwargs: Any) -> Any:
        if not isinstance(value, list | tuple) or not any(map(reads_data, value)):
            return NotImplemented
        return of_numbers(value, kwargs.get("dtype") or like.dtype)

    def rounded(how: Callable[[Any], Any]) -> Hook:
        def hook(func: Hook, tensor: torch.Tensor, *_: Any, **__: Any) -> Any:
            size = facts.of(tensor).size
            return NotImplemented if size is None else facts.note(func(tensor), size=how(size))

        return hook

    return {
        "bincount": bincount,
        "unique": unique,
        "one_hot": one_hot,
        "nonzero": nonzero,
        "where": where,
        "tolist": tolist,
        "numpy": numpy,
        "item": item,
        "__int__": item,  # not x.int() and x.bool(), which cast
        "__bool__": truth,
        "is_nonzero": truth,
        "tensor": tensor,
        "new_tensor": new_tensor,
        **dict.fromkeys(("lt", "le", "gt", "ge"), compared),
        "ceil": rounded(math.ceil),
        "floor": rounded(math.floor),
        "trunc": rounded(math.trunc),
    }


def _steps(ends: list[Any]) -> list[Any]:
    return [end - (ends[i - 1] if i else 0) for i, end in enumerate(ends)]
