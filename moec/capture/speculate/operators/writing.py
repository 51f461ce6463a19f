"""Hooks for in-place writes: into the rows of a mask, and into a buffer piece by piece."""

from __future__ import annotations

from typing import Any

import torch

from moec.capture.speculate.facts.facts import Piece
from moec.capture.speculate.facts.sums import Sums
from moec.capture.speculate.facts.symbols import expression, reads_data
from moec.capture.speculate.operators.hits import HitRows, Hits, as_tensor
from moec.capture.speculate.operators.hooks import Filling, Hook, Hooks, Trace
from moec.capture.speculate.operators.numbers import as_number
from moec.capture.speculate.operators.slicing import is_mask, with_rows
from moec.errors import CaptureError


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
