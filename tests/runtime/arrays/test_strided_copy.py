"""Bytes that are put together from strided copies of buffers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moec.runtime.arrays.strided_copy import StridedCopy, copied

SOURCE = np.arange(24, dtype=np.uint16)
TRANSPOSED = StridedCopy(0, 2, (4, 3), 6, (2, 8), 2, (6, 2))
"""Elements 3 to 14 as rows of 4, transposed, after one element of padding."""


def test_elements_are_copied_and_the_rest_is_zero() -> None:
    content = copied(28, [TRANSPOSED], [memoryview(SOURCE.tobytes())])
    elements = np.frombuffer(content, np.uint16)
    assert elements[1:13].tolist() == SOURCE[3:15].reshape(3, 4).T.ravel().tolist()
    assert elements[[0, 13]].tolist() == [0, 0]


def test_several_sources() -> None:
    other = SOURCE + 100
    copies = [StridedCopy(source, 2, (2,), 4, (2,), 4 * source, (2,)) for source in (1, 0)]
    content = copied(8, copies, [memoryview(SOURCE.tobytes()), memoryview(other.tobytes())])
    assert np.frombuffer(content, np.uint16).tolist() == [2, 3, 102, 103]


def test_a_piece_of_a_source_is_not_copied() -> None:
    source = memoryview(SOURCE)
    content = copied(12, [StridedCopy(0, 2, (2, 3), 4, (6, 2), 0, (6, 2))], [source.cast("B")])
    assert content.tobytes() == SOURCE[2:8].tobytes()
    assert np.shares_memory(np.frombuffer(content, np.uint8), SOURCE)


@pytest.mark.parametrize(
    "change",
    [
        {"read_at": 48 - 22},
        {"read_at": -2},
        {"write_at": 6},
        {"read_strides": (2, -8)},
        {"shape": (5, 3)},
        {"itemsize": -2},
    ],
)
def test_nothing_beyond_a_buffer_is_read_or_written(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"negative|buffer|strides|shape"):
        copied(28, [replace(TRANSPOSED, **change)], [memoryview(SOURCE.tobytes())])


def test_a_piece_that_a_source_lacks() -> None:
    with pytest.raises(ValueError, match="beyond its source"):
        copied(12, [StridedCopy(0, 2, (6,), 40, (2,), 0, (2,))], [memoryview(SOURCE.tobytes())])
