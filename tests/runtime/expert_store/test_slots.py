"""Slots within a limit of memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import UsageError
from moec.runtime.expert_store.slots import LayerSize, MemoryLimit, slots_within

LAYER = st.builds(LayerSize, st.integers(1, 64), st.integers(1, 10**9))
WORKING = MemoryLimit(0, 0, 0).working


def test_equal_layers_share_evenly():
    limit = MemoryLimit(WORKING + 800, 100, 60)
    assert slots_within(limit, [LayerSize(8, 20)] * 4) == [8] * 4
    assert slots_within(limit, [LayerSize(8, 40)] * 4) == [4] * 4
    assert slots_within(limit, [LayerSize(8, 37)] * 4) == [5, 4, 4, 4]


@given(st.lists(LAYER, min_size=1, max_size=8), st.floats(0, 1.5))
def test_what_fits_is_used(layers, share):
    least = sum(layer.expert_bytes for layer in layers)
    total = sum(layer.experts * layer.expert_bytes for layer in layers)
    limit = MemoryLimit(WORKING + max(least, int(share * total)), 0, 0)
    limit = MemoryLimit(limit.bytes + limit.working - WORKING, 0, 0)
    if limit.experts < least:
        return
    slots = slots_within(limit, layers)
    assert all(1 <= n <= layer.experts for n, layer in zip(slots, layers, strict=True))
    sizes = [layer.expert_bytes for layer in layers]
    size = sum(n * each for n, each in zip(slots, sizes, strict=True))
    assert size <= limit.experts
    if limit.experts >= total:
        assert size == total


def test_less_than_one_expert_a_layer_is_refused():
    limit = MemoryLimit(WORKING + 10**9, 10**8, 8 * 10**8)
    message = (
        r"memory is 1\.1 GB, and this model needs 1\.2 GB: 800\.0 MB of weights that are always in "
        r"memory, 160\.0 MB for one expert of each layer, 100\.0 MB of the process and 100\.7 MB"
    )
    with pytest.raises(UsageError, match=message):
        slots_within(limit, [LayerSize(8, 8 * 10**7)] * 2)
