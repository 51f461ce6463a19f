"""Hooks for selecting rows: between two numbers that were read from data, or by a mask."""

from __future__ import annotations

from typing import Any

import torch

from moec.capture.speculate.facts.facts import Member, Piece
from moec.capture.speculate.facts.following import follow
from moec.capture.speculate.facts.sum_rules import known_comparison
from moec.capture.speculate.facts.sums import Counts
from moec.capture.speculate.facts.symbols import expression, is_symbolic, reads_data
from moec.capture.speculate.operators.hits import HitRows, Hits, Row, as_slice, as_tensor
from moec.capture.speculate.operators.hooks import Hook, Hooks, Trace
from moec.capture.speculate.operators.numbers import as_number, numbers


def getitem(trace: Trace, func: Hook, x: torch.Tensor, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, Row) for part in parts):
        return func(x, tuple(as_slice(part) for part in parts))
    if any(isinstance(part, HitRows | Hits) for part in parts):
        return func(x, tuple(as_tensor(part) for part in parts))
    ids, width = trace.facts.of(x).one_hot_of, first_columns(parts)
    if ids is not None and width is not None:
        return (ids[..., None] == torch.arange(width)).to(torch.int64)
    if any(map(is_mask, parts)):
        return func(x, with_rows(trace, parts))
    first, *rest = parts
    if isinstance(first, torch.Tensor) and all(part is None for part in rest):
        order = trace.facts.of(first).order
        if order is not None:
            return _gathered(trace, x, order, rest, func(x, index))
    full = all(isinstance(part, slice) and part == slice(None) for part in rest)
    if isinstance(first, slice) and first.step is None and full:
        start, stop = (as_number(trace, end) for end in (first.start, first.stop))
        if start is None and is_symbolic(stop) and trace.equal(stop, x.shape[0]):
            return x  # all rows, of which more may be known
        if any(map(reads_data, (start, stop, x.shape[0]))):
            return slice_rows(trace, x, start, stop)
    return NotImplemented


def is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool and index.ndim > 0


def with_rows(trace: Trace, parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """An index with the rows of each mask in its place."""
    rows = [trace.rows_of(part) if is_mask(part) else (part,) for part in parts]
    return tuple(each for columns in rows for each in columns)


def first_columns(parts: tuple[Any, ...]) -> Any:
    """n of x[..., :n], if n does not depend on data; else None."""
    if len(parts) != 2 or parts[0] is not Ellipsis or not isinstance(parts[1], slice):
        return None
    start, stop, step = parts[1].start, parts[1].stop, parts[1].step
    plain = start in (None, 0) and step is None and stop is not None and not reads_data(stop)
    return stop if plain and (is_symbolic(stop) or stop >= 0) else None


def slice_rows(trace: Trace, x: torch.Tensor, start: Any, stop: Any) -> torch.Tensor:
    """Rows start to stop of x. The length is exactly stop - start: a slice by torch would get a
    new symbol as its length each time.

    If x is sorted by a choice, and start and stop are neighbouring sums of its counts, these
    are the rows of one class, unless the trace is to have pieces.
    """
    length = x.shape[0]
    start, stop = 0 if start is None else start, length if stop is None else stop
    trace.cuts |= {expression(end): end for end in (start, stop) if is_symbolic(end)}
    order, segment = trace.facts.of(x).order, trace.segments.get(expression(stop - start))
    if order is not None and segment is not None and trace.by_class:
        counts, number = segment
        choice, before = order.choice, sum(counts.numbers[:number], 0)
        keys, aligned = choice.sorted, expression(start - before) == 0
        if keys is not None and aligned and counts.choice is choice:
            trace.lists_classes = True
            if number not in choice.rows:
                choice.rows[number] = (keys == number).nonzero(as_tuple=True)[0]
                if len(choice.rows) == choice.classes and counts.total is not None:
                    lengths = sum(rows.shape[0] for rows in choice.rows.values())
                    trace.totals[expression(lengths)] = counts.total
            return order.recipe(choice.rows[number])
    if segment is not None and not trace.by_class:
        counts, number = segment
        before, total = sum(counts.numbers[:number], 0), sum(counts.numbers, 0)
        if expression(start - before) == 0 and trace.equal(total, length):
            piece = _pieces(trace, x, counts)[number]
            trace.facts.note(piece, piece=Piece(x, start, stop))
            return piece
    if trace.equal(stop, length):
        stop = length
        if expression(start) == 0:
            return x
    if reads_data(length) and not reads_data(stop):
        stop = torch.sym_min(stop, length)  # type: ignore[no-untyped-call]
    if reads_data(length) and not reads_data(start) and expression(start) != 0:
        start = torch.sym_min(start, stop)  # type: ignore[no-untyped-call]
    part: torch.Tensor = torch.split(x, [start, stop - start, length - stop])[1]
    trace.facts.note(part, piece=Piece(x, start, stop))
    return part


def _pieces(trace: Trace, x: torch.Tensor, counts: Counts) -> tuple[torch.Tensor, ...]:
    """The rows of every class, in one split."""
    pieces = trace.facts.of(x).pieces
    if pieces is None or pieces[0] is not counts:
        sizes = counts.numbers[:-1]
        pieces = counts, torch.split(x, [*sizes, x.shape[0] - sum(sizes, 0)])
        trace.facts.note(x, pieces=pieces)
    return pieces[1]


def index_select(trace: Trace, func: Hook, x: torch.Tensor, dim: int, index: torch.Tensor) -> Any:
    order = trace.facts.of(index).order
    if dim != 0 or order is None:
        return NotImplemented
    return _gathered(trace, x, order, [], func(x, dim, index))


def masked_select(
    trace: Trace, func: Hook, x: torch.Tensor, mask: torch.Tensor, **rest: Any
) -> Any:
    """The values of x where the mask is set. An axis along which x repeats needs no index."""
    if rest or not mask.ndim:
        return NotImplemented
    shape = torch.broadcast_shapes(x.shape, mask.shape)  # type: ignore[no-untyped-call]
    same_shape = list(map(expression, mask.shape)) == list(map(expression, shape))
    rows = trace.rows_of(mask if same_shape else mask.expand(shape))
    wide = x.expand(shape)
    for axis in reversed(range(wide.ndim)):
        if wide.ndim > 1 and type(wide.stride(axis)) is int and wide.stride(axis) == 0:
            wide, rows = wide.select(axis, 0), (*rows[:axis], *rows[axis + 1 :])
    return wide[rows]


def narrow(trace: Trace, func: Hook, x: torch.Tensor, dim: int, start: Any, length: Any) -> Any:
    start, length = as_number(trace, start), as_number(trace, length)
    if dim != 0 or not any(map(reads_data, (start, length))):
        return NotImplemented
    return slice_rows(trace, x, start, start + length)


def split(trace: Trace, func: Hook, x: torch.Tensor, sizes: Any, dim: int = 0) -> Any:
    """The last size is computed as the remainder, so that the sizes are known to add up."""
    if isinstance(sizes, list | tuple) and not isinstance(sizes, HitRows):
        sizes = [as_number(trace, size) for size in sizes]
    if not isinstance(sizes, list) or not any(map(reads_data, sizes)):
        return NotImplemented
    trace.totals[expression(sum(sizes, 0))] = x.shape[dim]
    rest = x.shape[dim] - sum(sizes[:-1], 0)
    parts = torch.split(x, [*sizes[:-1], rest], dim)
    ends = [*(sum(sizes[: i + 1], 0) for i in range(len(sizes) - 1)), x.shape[dim]]
    for part, start, stop in zip(parts, [0, *ends[:-1]], ends, strict=True):
        if dim == 0:
            trace.facts.note(part, piece=Piece(x, start, stop))
    return parts


def tensor_split(trace: Trace, func: Hook, x: torch.Tensor, ends: Any, dim: int = 0) -> Any:
    """Split at positions; the last part extends to the end."""
    if isinstance(ends, torch.Tensor) and ends.ndim == 1 and type(ends.shape[0]) is int:
        trace.reads[trace.at()] = None
        ends = numbers(trace, ends)
    if not isinstance(ends, list | tuple) or not any(map(reads_data, ends)):
        return NotImplemented
    stops = [*ends, x.shape[dim]]
    return split(trace, func, x, [b - a for a, b in zip([0, *ends], stops, strict=True)], dim)


def eq(trace: Trace, func: Hook, ids: torch.Tensor, expert: Any) -> Any:
    result = func(ids, expert)
    choice = trace.facts.of(ids).choice
    if trace.facts.of(ids).truth == "count" or trace.facts.of(ids).sums is not None:
        always = known_comparison(trace.facts, "eq", (ids, expert))
        trace.facts.note(result, truth="none", always=always)
    classes = trace.facts.of(ids).even
    if classes is not None and type(expert) is int and 0 <= expert < classes:
        trace.facts.note(result, positive=True)
    if choice is None or not isinstance(expert, int):
        return result
    return trace.facts.note(result, member=Member(ids, expert))


def intersect_hits(trace: Trace, func: Hook, a: Any, b: Any) -> Any:
    """(ids == e) & other as where(other, ids, no expert) == e, which recognition matches."""
    for one, other in ((a, b), (b, a)):
        member = trace.facts.of(one).member
        if member is None or not isinstance(other, torch.Tensor):
            continue
        choice = trace.facts.of(member.ids).choice
        if choice is None or other.shape != member.ids.shape or trace.facts.of(other).member:
            continue
        key = ("left", id(member.ids), id(other))
        if key not in trace.listed:
            left = torch.where(other, member.ids, choice.classes)
            trace.listed[key] = (member.ids, other, left)
        return trace.listed[key][2] == member.expert
    return NotImplemented


def sort(trace: Trace, func: Hook, ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """A stable sort: rows of equal classes keep their order, as in the lists of rows."""
    if trace.facts.of(ids).choice is None or ids.ndim != 1:
        return NotImplemented
    options = {**dict(zip(("dim", "descending"), args, strict=False)), **kwargs}
    result = func(ids, **{**options, "stable": True})
    if not options.get("descending"):
        follow(trace.facts, "sort", (ids,), options, result)
        if isinstance(result, tuple):
            trace.facts.note(result[0], ascending=True)
    return result


def _gathered(trace: Trace, x: torch.Tensor, order: Any, rest: Any, result: Any) -> Any:
    """x in the order that sorts a choice is a function of that order as well."""
    recipe = order.recipe
    if x is order.choice.sorted and not rest:
        trace.facts.note(result, choice=order.choice, ascending=True)
    return trace.facts.note(
        result, order=type(order)(order.choice, lambda rows: x[(recipe(rows), *rest)])
    )


SLICING: Hooks = {
    "sort": sort,
    "argsort": sort,
    "getitem": getitem,
    "index_select": index_select,
    "masked_select": masked_select,
    "narrow": narrow,
    "split": split,
    "split_with_sizes": split,
    "tensor_split": tensor_split,
    "eq": eq,
    "and": intersect_hits,
    "logical_and": intersect_hits,
    "bitwise_and": intersect_hits,
}
