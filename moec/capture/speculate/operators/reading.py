"""Hooks for data that Python reads: counts, class ids, lists of rows, numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch

from moec.capture.speculate.facts.following import follow
from moec.capture.speculate.facts.singles import single_of
from moec.capture.speculate.facts.sums import MOST_NUMBERS, constants, joined
from moec.capture.speculate.facts.symbols import expression, is_symbolic, reads_data
from moec.capture.speculate.operators.hits import HitRows, Hits, as_tensor
from moec.capture.speculate.operators.hooks import Hook, Hooks, Trace
from moec.capture.speculate.operators.numbers import as_number, number, numbers
from moec.errors import CaptureError
from moec.torch_private import check


def one_hot(trace: Trace, func: Hook, ids: torch.Tensor, num_classes: Any = -1) -> Any:
    fact, num_classes = trace.facts.of(ids), as_number(trace, num_classes)
    if isinstance(num_classes, int) and num_classes < 0:
        if fact.choice is None:
            return NotImplemented
        num_classes = fact.choice.classes
    if reads_data(num_classes):
        check(num_classes > 1)  # one class would broadcast
    hot = (ids[..., None] == torch.arange(num_classes)).to(torch.int64)
    if reads_data(num_classes):
        return trace.facts.note(hot, one_hot_of=ids)
    full = fact.choice is not None and num_classes == fact.choice.classes
    return trace.facts.note(
        hot,
        high=1,
        single=hot.ndim - 2 if fact.distinct else None,
        hot=(fact.choice, ids.numel(), fact.even == num_classes) if full else None,
    )


def nonzero(trace: Trace, func: Hook, mask: torch.Tensor, *, as_tuple: bool = False) -> Any:
    """All indices of a mask of fixed length; otherwise the rows, whose number is recorded."""
    fact = trace.facts.of(mask)
    if mask.ndim == 1 and type(mask.shape[0]) is int and fact.truth in ("some", "count"):
        trace.reads[trace.at()] = None
        trace.lengths.append(mask.shape[0])
        hits = Hits(mask.shape[0] - (mask.shape[0] in trace.open), column=not as_tuple)
        return (hits,) if as_tuple else hits
    if isinstance(mask, torch.Tensor) and mask.ndim:
        return trace.counted(mask, func(mask, as_tuple=as_tuple) if as_tuple else func(mask))
    return NotImplemented


def where(trace: Trace, func: Hook, mask: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
    return NotImplemented if rest or kwargs else nonzero(trace, torch.nonzero, mask, as_tuple=True)


def tolist(trace: Trace, func: Hook, tensor: torch.Tensor) -> Any:
    trace.reads[trace.at()] = None
    if tensor.ndim == 0:
        return item(trace, func, tensor)
    if reads_data(tensor.shape[0]):
        if tensor.ndim > 1:
            raise CaptureError("rows of several numbers each, as many as the data say")
        return HitRows(tensor, lambda condition: bool(condition))
    if not all(isinstance(size, int) for size in tensor.shape):
        chosen = trace.facts.of(tensor).choice is not None
        return ChosenIds(tensor) if chosen else NotImplemented
    if tensor.ndim == 1:
        return numbers(trace, tensor)
    return [tolist(trace, func, row) for row in tensor]


def numpy(trace: Trace, func: Hook, tensor: torch.Tensor, *_: Any, **__: Any) -> Any:
    if not all(isinstance(size, int) for size in tensor.shape):
        return NotImplemented
    array = np.empty(tuple(tensor.shape), dtype=object)
    values = tolist(trace, func, tensor)
    array[...] = values
    return array


def item(trace: Trace, func: Hook, tensor: torch.Tensor) -> Any:
    trace.reads[trace.at()] = None
    return number(trace, tensor)


def arange(trace: Trace, func: Hook, *args: Any, **kwargs: Any) -> Any:
    """Numbers that are known when Python reads them; and all classes, if their number is fixed: the
    choices of a layer that takes every expert."""
    result = func(*args, **kwargs)
    if result.is_floating_point() or not all(type(each) is int for each in args):
        return result
    if args and len(range(*args)) <= MOST_NUMBERS:
        trace.facts.note(result, elements=tuple(range(*args)))
    return trace.facts.note(result, even=args[0]) if len(args) == 1 else result


def truth(trace: Trace, func: Hook, tensor: torch.Tensor) -> Any:
    """A comparison of sizes is a guard, a condition that does not depend on data has its value, and
    any other is a branch on data."""
    fact = trace.facts.of(tensor)
    if fact.condition is not None:
        return bool(fact.condition)
    if fact.always is not None or fact.positive:
        return fact.positive if fact.always is None else fact.always
    return trace.branches.ask(tensor, fact.truth != "none")


def tensor(trace: Trace, func: Hook, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Records the number in a tensor built from a size; a list of rows becomes its tensor."""
    if isinstance(value, HitRows):
        return as_tensor(value).to(kwargs.get("dtype") or torch.int64)
    if isinstance(value, torch.SymFloat):
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        if dtype != torch.float32:
            return NotImplemented
        return trace.facts.note(torch.zeros(()), float32=single_of(value, trace.sizes))
    if is_symbolic(value):
        dtype = kwargs.get("dtype") or torch.int64
        held = torch.full((), value, dtype=dtype)  # type: ignore[call-overload]
        return trace.facts.note(held, size=value)
    if isinstance(value, list | tuple) and any(map(reads_data, value)):
        return of_numbers(trace, value, kwargs.get("dtype") or torch.int64)
    result = func(value, *args, **kwargs)
    if type(value) is list and value and all(type(each) is int for each in value):
        trace.facts.note(result, sums=constants(value))
    if type(value) is int:
        result = torch.full((), value, dtype=result.dtype)
    return trace.facts.note(result, size=value) if type(value) in (int, float) else result


def filled(value: int, trace: Trace, func: Hook, *args: Any, **kwargs: Any) -> Any:
    """A short row of one integer, into which sums of counts may be written or
    concatenated; or a tensor of zeros, in which the choices may be marked."""
    result = func(*args, **kwargs)
    if result.ndim > 1:
        return trace.facts.note(result, zero=value == 0)
    length = result.shape[0] if result.ndim == 1 else None
    if type(length) is int and 0 < length <= MOST_NUMBERS:
        trace.facts.note(result, sums=constants([value] * length))
    return result


def empty_like(trace: Trace, func: Hook, x: torch.Tensor, **kwargs: Any) -> Any:
    """A tensor as long as all parts of a cut tensor has the length of that tensor."""
    rows: Any = trace.total(x.shape[0]) if x.ndim else None
    if not x.ndim or rows is x.shape[0]:
        return NotImplemented
    return func(x.new_empty((rows, *x.shape[1:])), **kwargs)


def iterated(trace: Trace, func: Hook, tensor: torch.Tensor) -> Any:
    """Iterates over a tensor, with the facts of each of its values."""
    if trace.facts.of(tensor).sums is None:
        return NotImplemented
    parts = tensor.unbind(0)
    follow(trace.facts, "unbind", (tensor,), {}, parts)
    return iter(parts)


def cat(trace: Trace, func: Hook, parts: Any, dim: int = 0, **kwargs: Any) -> Any:
    """Without the parts that are known to be empty, such as a padding to the number of rows."""
    if all(part.ndim for part in parts):
        parts = [part for part in parts if not trace.is_zero(part.shape[dim])] or parts
    result = func(parts, dim=dim, **kwargs)
    sums = [trace.facts.of(part).sums for part in parts]
    lists = [each for each in sums if each is not None]
    return trace.facts.note(result, sums=joined(lists)) if len(lists) == len(sums) else result


def vstack(trace: Trace, func: Hook, parts: Any, **kwargs: Any) -> Any:
    matrices = all(part.ndim > 1 for part in parts)
    return cat(trace, torch.cat, parts, **kwargs) if matrices else NotImplemented


def pad(
    trace: Trace, func: Hook, tensor: torch.Tensor, widths: Any, *args: Any, **kwargs: Any
) -> Any:
    """Zeros before and after sums of counts."""
    result, sums = func(tensor, widths, *args, **kwargs), trace.facts.of(tensor).sums
    plain = len(widths) == 2 and not kwargs.get("value") and args in ((), ("constant",))
    if sums is None or sums.matrix.ndim < 2 or not plain or min(widths) < 0:
        return result
    first, last = (constants([0] * width) for width in widths)
    return trace.facts.note(result, sums=joined([first, sums, last]))


def of_numbers(trace: Trace, values: Sequence[Any], dtype: torch.dtype) -> Any:
    """A tensor of numbers that Python has read, built from the tensors that held them."""
    parts = [trace.readouts.get(expression(value)) for value in values]
    parts = [v if part is None else part for part, v in zip(parts, values, strict=True)]
    if any(map(reads_data, parts)):
        return NotImplemented
    return torch.stack([torch.as_tensor(part).reshape(()).to(dtype) for part in parts])


def new_tensor(trace: Trace, func: Hook, like: torch.Tensor, value: Any, **kwargs: Any) -> Any:
    if not isinstance(value, list | tuple) or not any(map(reads_data, value)):
        return NotImplemented
    return of_numbers(trace, value, kwargs.get("dtype") or like.dtype)


READING: Hooks = {
    "arange": arange,
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), partial(filled, 0)),
    "empty_like": empty_like,
    "iter": iterated,
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    "vstack": vstack,
    "pad": pad,
    "one_hot": one_hot,
    "nonzero": nonzero,
    "where": where,
    "tolist": tolist,
    "numpy": numpy,
    "item": item,
    "__int__": item,  # only the conversions to numbers: x.int() and x.bool() are casts
    "__bool__": truth,
    "is_nonzero": truth,
    "tensor": tensor,
    "new_tensor": new_tensor,
}


class ChosenIds(list[Any]):
    """The ids of a choice as a list that is as long as there are tokens. Only its length is known:
    what reads its elements raises CaptureError."""

    def __init__(self, ids: torch.Tensor) -> None:
        super().__init__()
        self.tensor = ids

    def __bool__(self) -> bool:
        return bool(self.tensor.shape[0] > 0)

    def __len__(self) -> int:
        raise CaptureError("the length of a list of tokens varies")

    def __iter__(self) -> NoReturn:
        raise CaptureError(
            "a loop over tokens, whose number varies, cannot be unrolled: loop over the experts, "
            "and take the rows of each with torch.where(ids == expert)"
        )

    def __contains__(self, value: object) -> NoReturn:
        raise CaptureError("a list of tokens is searched: compare the tensor of ids instead")

    def count(self, value: Any) -> NoReturn:
        raise CaptureError("a list of tokens is counted: use torch.bincount(ids) instead")

    def __getitem__(self, index: Any) -> NoReturn:
        raise CaptureError("a list of tokens is read by place: index the tensor instead")
