"""Bytes of one buffer as strided copies from others: how a stored array follows from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moec.runtime.dtypes import Array


@dataclass(frozen=True)
class StridedCopy:
    """Elements of `itemsize` bytes that are copied from buffer number `source` to an array. Offsets
    and strides are in bytes, and none is negative."""

    source: int
    itemsize: int
    shape: tuple[int, ...]
    read_at: int
    read_strides: tuple[int, ...]
    write_at: int
    write_strides: tuple[int, ...]


def copied(size: int, copies: Sequence[StridedCopy], sources: Sequence[memoryview]) -> memoryview:
    """`size` bytes that are filled by `copies`; bytes that none of them writes are 0.

    Nothing is copied where they are a contiguous piece of one source. Raises ValueError where a
    copy reads or writes beyond a buffer.
    """
    if len(copies) == 1 and _is_contiguous(copies[0], size):
        (copy,) = copies
        piece = sources[copy.source][copy.read_at : copy.read_at + size]
        if piece.nbytes != size:
            raise ValueError("a copy reads beyond its source")
        return piece
    array = np.zeros(size, np.uint8)
    for copy in copies:
        target = _view(array.data, copy.itemsize, copy.shape, copy.write_at, copy.write_strides)
        target[...] = _view(
            sources[copy.source], copy.itemsize, copy.shape, copy.read_at, copy.read_strides
        )
    return array.data


def _is_contiguous(copy: StridedCopy, size: int) -> bool:
    strides: list[int] = []
    compact = copy.itemsize
    for extent in reversed(copy.shape):
        strides.insert(0, compact)
        compact *= extent
    return (
        compact == size
        and copy.write_at == 0
        and tuple(strides) == copy.read_strides == copy.write_strides
    )


def _view(
    buffer: memoryview, itemsize: int, shape: tuple[int, ...], at: int, strides: tuple[int, ...]
) -> Array:
    """A view of part of a buffer. Raises ValueError where it does not fit."""
    if min((at, itemsize, *shape, *strides)) < 0:
        raise ValueError("a copy has a negative size, offset or stride")
    return np.ndarray(shape, np.dtype(f"V{itemsize}"), buffer, at, strides)
