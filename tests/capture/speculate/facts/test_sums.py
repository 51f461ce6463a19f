"""Sums of counts behave like tensors and give the same numbers."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moec.capture.speculate.facts.sums import Counts, added, constants, joined

NUMBERS = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@given(NUMBERS, st.data())
def test_sums_are_what_tensors_give(numbers: list[int], data: st.DataObject) -> None:
    tensor = torch.tensor(numbers)
    counts = Counts(tensor).sums()
    ends, starts = counts.so_far(), added(counts.so_far(), counts, -1)
    assert ends.values(numbers) == tensor.cumsum(0).tolist()
    assert starts is not None
    assert starts.values(numbers) == (tensor.cumsum(0) - tensor).tolist()

    offsets = joined([constants([0]), ends])
    written = constants([0] * (len(numbers) + 1)).replaced(slice(1, None), ends)
    assert offsets is not None
    assert written is not None
    assert offsets.values(numbers) == written.values(numbers) == [0, *ends.values(numbers)]

    at = data.draw(st.integers(-len(numbers), len(numbers) - 1))
    one, rest = ends.picked(at), ends.picked(slice(at, None))
    assert one is not None
    assert rest is not None
    assert one.values(numbers) == tensor.cumsum(0)[at]
    assert rest.values(numbers) == tensor.cumsum(0)[at:].tolist()


def test_sums_of_different_counts_are_not_followed() -> None:
    one, other = (Counts(torch.tensor([1, 2])).sums() for _ in range(2))
    assert added(one, other, 1) is None
    assert joined([one, other]) is None
    assert one.picked(torch.tensor(0)) is None
    assert one.replaced(slice(0, 1), constants([1, 2])) is None
