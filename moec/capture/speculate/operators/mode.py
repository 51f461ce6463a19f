"""The hooks as a torch function mode, which intercepts the user's calls of torch functions."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moec.capture.intercept.substitutes import integer_of, python_type
from moec.capture.speculate.facts.facts import Piece
from moec.capture.speculate.facts.following import follow
from moec.capture.speculate.facts.rounding import ROUNDINGS, Rounding
from moec.capture.speculate.facts.singles import (
    OPERATIONS,
    Single,
    combined,
    rounded_single,
    single_of,
)
from moec.capture.speculate.facts.sums import ClassChoice, Counts, Sums
from moec.capture.speculate.facts.symbols import expression, reads_data
from moec.capture.speculate.operators.hits import HitRows, Hits, as_tensor
from moec.capture.speculate.operators.hooks import Filling, Hook, Hooks, Trace
from moec.capture.speculate.operators.numbers import as_number
from moec.capture.speculate.operators.reading import READING
from moec.capture.speculate.operators.scattering import SCATTERING
from moec.capture.speculate.operators.slicing import SLICING, is_mask, with_rows
from moec.errors import CaptureError
from moec.torch_private import pytree


def full(size: Any, dtype: torch.dtype) -> Any:
    """A tensor of one number, which may be symbolic."""
    return torch.full((), size, dtype=dtype)


def compared(relation: Callable[[Any, Any], Any], trace: Trace, func: Hook, a: Any, b: Any) -> Any:
    """Compares sizes in tensors as sizes, and of a symbolic float that was made from an
    integer, whose expression is known, that integer."""
    sizes = [trace.facts.of(x).size if isinstance(x, torch.Tensor) else x for x in (a, b)]
    if None not in sizes:
        return trace.facts.note(func(a, b), condition=relation(*sizes))
    if integer_of(a) is a and integer_of(b) is b:
        return NotImplemented
    return func(integer_of(a), integer_of(b))


def single(trace: Trace, value: Any) -> Single | None:
    if not isinstance(value, torch.Tensor):
        return single_of(value, trace.sizes)
    fact = trace.facts.of(value)
    if value.ndim or value.dtype != torch.float32:
        return None
    constant = isinstance(fact.size, int | float)
    return fact.float32 or (single_of(fact.size, trace.sizes) if constant else None)


def arithmetic(
    operation: Callable[[Any, Any], Any],
    trace: Trace,
    func: Hook,
    a: Any,
    b: Any,
    *rest: Any,
    **options: Any,
) -> Any:
    """Arithmetic of a float32 number and one that is computed of a size. The tensor has no
    value where a symbolic float is involved: only its rounding has."""
    left, right = single(trace, a), single(trace, b)
    result = combined(operation, left, right) if left and right else None
    if rest or options or result is None or result.of is None:
        return NotImplemented
    exact = not any(isinstance(x, torch.SymFloat) or trace.facts.of(x).float32 for x in (a, b))
    return trace.facts.note(func(a, b) if exact else torch.zeros(()), float32=result)


def rounded(
    how: Rounding, trace: Trace, func: Hook, tensor: torch.Tensor, *_: Any, **__: Any
) -> Any:
    fact = trace.facts.of(tensor)
    if fact.size is not None:
        size = getattr(math, how)(fact.size)
        return trace.facts.note(full(size, tensor.dtype), size=size)
    if fact.float32 is None:
        return NotImplemented
    size = rounded_single(fact.float32, how)
    if size is None:
        raise CaptureError(
            "a size that a tensor computes in single precision rounds as no integer "
            "division does: compute it in Python floats"
        )
    return trace.facts.note(full(size, tensor.dtype), size=size)


def cast(trace: Trace, func: Hook, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """An integer that is known stays a number, on both sides of a branch that chooses it."""
    size = trace.facts.of(tensor).size
    if tensor.ndim or not isinstance(size, int | torch.SymInt):
        return NotImplemented
    result = func(tensor, *args, **kwargs)
    if result.is_floating_point():
        return NotImplemented
    return trace.facts.note(full(size, result.dtype), size=size)


SIZING: Hooks = {
    **{name: partial(compared, getattr(operator, name)) for name in ("lt", "le", "gt", "ge")},
    **{name: partial(arithmetic, operation) for name, operation in OPERATIONS.items()},
    **{name: partial(rounded, name) for name in ROUNDINGS},
    **dict.fromkeys(("to", "long", "int"), cast),
}


def fill(trace: Trace, piece: Piece, values: torch.Tensor) -> torch.Tensor:
    """Records a piece. Once the last piece is written, the buffer is their concatenation."""
    buffer = piece.buffer
    state = trace.filling.setdefault(id(buffer), Filling())
    if expression(piece.start) != expression(state.stop):
        raise CaptureError("a buffer is filled in pieces that do not follow one another")
    state.stop = piece.stop
    state.parts.append(values)
    if trace.equal(piece.stop, buffer.shape[0]):
        trace.buffers[id(buffer)] = buffer, torch.cat(trace.filling.pop(id(buffer)).parts)
    return values


def setitem(trace: Trace, func: Hook, x: torch.Tensor, index: Any, values: Any) -> Any:
    if isinstance(index, Hits) and not index.column:
        index = slice(0, len(index))
    sums = _sums_written(trace, x, index, values)
    trace.written(x)
    if sums is not None:
        func(x, index, values)
        trace.facts.note(x, sums=sums)
        return None
    if isinstance(index, slice):
        start, stop = (as_number(trace, end) for end in (index.start, index.stop))
        index = slice(start, stop, index.step)
    if is_mask(index):
        if isinstance(values, torch.Tensor) and values.ndim:
            func(x, trace.rows_of(index), values)
        else:
            x.masked_fill_(index.reshape(*index.shape, *[1] * (x.ndim - index.ndim)), values)
        return None
    if isinstance(index, slice) and any(map(reads_data, (index.start, index.stop))):
        stop = x.shape[0] if index.stop is None else index.stop
        fill(trace, Piece(x, 0 if index.start is None else index.start, stop), values)
        return None
    if isinstance(index, tuple) and any(map(is_mask, index)):
        return func(x, with_rows(trace, index), values)
    if isinstance(index, HitRows):
        return func(x, as_tensor(index), values)
    if isinstance(index, tuple) and any(isinstance(part, HitRows | Hits) for part in index):
        return func(x, tuple(map(as_tensor, index)), values)
    return NotImplemented


def copy_(trace: Trace, func: Hook, x: torch.Tensor, values: torch.Tensor, *args: Any) -> Any:
    piece = trace.facts.of(x).piece
    return NotImplemented if piece is None else fill(trace, piece, values)


def out(trace: Trace, func: Hook, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Writes `values` into the tensor given as out=."""
    piece = trace.facts.of(x).piece
    trace.written(x)
    return x.copy_(values) if piece is None else fill(trace, piece, values)


def _sums_written(trace: Trace, x: torch.Tensor, index: Any, values: Any) -> Sums | None:
    """The sums of counts in x after `values` are written at `index`; None if unknown."""
    before, other = trace.facts.of(x).sums, trace.facts.of(values).sums
    if before is None or other is None:
        return None
    return before.replaced(index, other)


WRITING: Hooks = {"setitem": setitem, "copy_": copy_, "out=": out}


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
    fact = trace.facts.of(ids)
    classes = fact.choice.classes if fact.choice is not None else fact.even
    if classes is None or dim is not None:
        return NotImplemented
    trace.reads[trace.at()] = None
    results: list[Any] = [Hits(classes)]
    if return_inverse:
        results.append(trace.facts.note(ids.clone(), **vars(fact)))
    if return_counts:
        results.append(counted(trace, ids, classes))
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


def noise(trace: Trace, func: Hook, *args: Any, **kwargs: Any) -> Any:
    """Zeros instead of random numbers; the proof shows that they do not change the result."""
    trace.noise[trace.at()] = None
    result = func(*args, **kwargs)
    return torch.zeros(result.shape, dtype=result.dtype)


def drawn(trace: Trace, func: Hook, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """As `noise`, written into x."""
    trace.noise[trace.at()] = None
    trace.written(x)
    return x.zero_()


def dropped(trace: Trace, func: Hook, *args: Any, **kwargs: Any) -> Any:
    """Random numbers for which zeros are no substitute: recorded with this line, so that a
    refusal can name it."""
    trace.noise[trace.at()] = None
    return NotImplemented


def dropout(trace: Trace, func: Hook, *args: Any, **kwargs: Any) -> Any:
    """Dropout, which draws no numbers in eval mode or where p is 0."""
    named = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    training = named.get("train", named.get("training", True))
    drops = training and named.get("p", 0.5)
    return dropped(trace, func, *args, **kwargs) if drops else NotImplemented


EVALUATION: Hooks = {
    "dropout": dropout,
    **dict.fromkeys(("randn_like", "rand_like", "randn", "rand", "normal"), noise),
    **dict.fromkeys(("normal_", "uniform_"), drawn),
    **dict.fromkeys(("bernoulli", "bernoulli_", "multinomial", "exponential_", "randint"), dropped),
}


_HOOKS: Hooks = {
    **READING,
    **COUNTING,
    **SIZING,
    **SLICING,
    **WRITING,
    **SCATTERING,
    **EVALUATION,
}

_IN_PLACE = frozenset(
    "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split()
)
"""Function names of `x += y` and the like, which write into x."""

_LIKE = frozenset("empty_like zeros_like ones_like new_empty new_zeros new_ones".split())
"""Functions that read no values of their operand: they may receive the buffer before it was filled,
which has a known length."""


class Speculation(TorchFunctionMode):
    """Runs the hooks of `trace`, and propagates facts through all other calls."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.hooks = {name: partial(hook, trace) for name, hook in _HOOKS.items()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        method = getattr(func, "__name__", "")
        if method == "__get__":  # x.T is a call of the property's getter
            method = getattr(func.__self__, "__name__", "")  # type: ignore[attr-defined]
        like = args[:1] if method in _LIKE else ()
        args, named = self.latest((args[len(like) :], dict(kwargs or {})))
        args = (*like, *map(python_type, args))
        named = {name: python_type(value) for name, value in named.items()}
        name = method.strip("_") if method.startswith("__") else method
        out = named.pop("out", None)
        if isinstance(out, torch.Tensor):
            return self.hooks["out="](func, out, func(*args, **named))
        hook = self.hooks.get(method) or self.hooks.get(name)
        if hook is not None:
            result = hook(func, *args, **named)
            if result is not NotImplemented:
                return result
        result = func(*args, **named)
        if args and (name.endswith("_") or name in _IN_PLACE):
            self.trace.written(args[0])
        else:
            follow(self.trace.facts, name, args, named, result)
        return result

    def latest(self, tree: Any) -> Any:
        """`tree` with each buffer that was filled piece by piece replaced by its contents."""
        buffers = self.trace.buffers
        if not buffers:
            return tree
        return pytree.tree_map(lambda leaf: buffers.get(id(leaf), (leaf, leaf))[1], tree)
