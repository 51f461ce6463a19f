"""Replays of routing with a part of the experts in memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import UsageError
from moec.plan.simulation.residency import EVICTIONS, Eviction, hit_rates, layer_hits
from moec.plan.simulation.slots_by_trace import slots_by_trace
from moec.runtime.call.routing_trace import RoutingTrace
from moec.runtime.expert_store.slots import LayerSize, MemoryLimit
from tests.systems.records import load

system = load("23_read_me")
WORKING = MemoryLimit(0, 0, 0).working


def trace_of(ids: np.ndarray, experts: int, tokens_a_step: int = 1) -> RoutingTrace:
    """Of ids [T, L, K]."""
    count, layers, _ = ids.shape
    steps = np.arange(count, dtype=np.int32) // tokens_a_step
    return RoutingTrace(
        ids.astype(np.int16),
        steps,
        np.ones(count, np.uint8),
        np.zeros(count, np.int32),
        np.full(layers, experts, np.int32),
    )


def hits_of(experts: list[int], slots: int, eviction: Eviction) -> int:
    return layer_hits(trace_of(np.array(experts).reshape(-1, 1, 1), 8), 0, slots, eviction)[0]


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=60), st.integers(1, 8))
def test_one_expert_a_step_is_a_cache(experts, slots):
    assert hits_of(experts, slots, Eviction("lru")) == system.cache_hits(experts, slots, "lru")
    best = system.cache_hits(experts, slots, "belady")
    assert hits_of(experts, slots, Eviction("belady", window=len(experts))) == best
    for eviction in EVICTIONS:
        assert hits_of(experts, slots, eviction) <= best


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 16))
def test_all_in_memory_misses_once_each(seed, tokens_a_step, layers):
    ids = np.random.default_rng(seed).integers(-1, 8, (12, 2, 2))
    trace = trace_of(ids, 8, tokens_a_step)
    for eviction in EVICTIONS:
        for layer in range(2):
            hits, visits = layer_hits(trace, layer, 8, eviction)
            assert visits - hits == len(set(ids[:, layer].ravel()) - {-1})


def test_what_each_policy_evicts():
    """With two slots, 2 needs the slot of 0 or of 1, and then one of them is used."""
    often = [0, 0, 0, 1, 2, 0]
    assert hits_of(often, 2, Eviction("lru")) == 2
    assert hits_of(often, 2, Eviction("lfu", half_life=64)) == 3
    assert hits_of(often, 2, Eviction("slru")) == 3
    assert hits_of(often, 2, Eviction("pinned")) == 3
    assert hits_of([0, 0, 0, 1, 2, 1], 2, Eviction("belady", window=1)) == 3
    assert hits_of([0, 1, 2, 3, 3, 0], 2, Eviction("belady", window=1)) == 1


def test_no_tokens():
    trace = trace_of(np.zeros((0, 2, 2), np.int64), 8)
    assert set(hit_rates(trace).values()) == {(0.0,) * 4}


def test_layers_get_slots_where_they_hit():
    """Two experts serve the first layer; the other's choices are spread."""
    generator = np.random.default_rng(0)
    ids = np.stack(
        [generator.integers(0, 2, (400, 1)), np.sort(generator.integers(0, 16, (400, 1)))], 1
    )
    trace = trace_of(ids, 16)
    layers = [LayerSize(16, 100)] * 2
    slots, best = slots_by_trace(trace, MemoryLimit(WORKING + 1600, 0, 0), layers)
    assert slots == [2, 14]
    assert best.policy in ("lru", "lfu", "slru")


def test_the_routing_of_another_model():
    trace = trace_of(np.zeros((4, 2, 1), np.int64), 8)
    message = "the routing is of 2 layers with 8 experts, and the model has 2 with 4 to 8: record"
    with pytest.raises(UsageError, match=message):
        slots_by_trace(trace, MemoryLimit(1 << 30, 0, 0), [LayerSize(8, 1), LayerSize(4, 1)])
