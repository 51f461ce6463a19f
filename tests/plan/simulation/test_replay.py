"""Caches of experts and batches of tokens, replayed on traces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.errors import UsageError
from moec.plan.simulation.replay import (
    batches_by_expert,
    batches_in_order,
    cache_hits,
    experts_per_batch,
    next_uses,
)

traces = st.lists(st.integers(0, 6), max_size=60)


def test_what_is_evicted() -> None:
    """At 2, room is needed: 0 comes back sooner than 1, and was used before it."""
    trace = [0, 1, 2, 0, 1]
    assert next_uses(trace) == [3, 4, float("inf"), float("inf"), float("inf")]
    assert cache_hits(trace, 2, "belady") == 1
    assert cache_hits(trace, 2, "lru") == 0
    assert cache_hits([0, 1, 0, 2, 0], 2, "lru") == 2
    assert cache_hits([0, 1, 0, 2, 0], 2, "fifo") == 1


@given(traces, st.integers(1, 7), st.integers(0, 9))
def test_no_policy_hits_more_often_than_belady(trace: list[int], size: int, seed: int) -> None:
    best = cache_hits(trace, size, "belady")
    for policy in ("lru", "fifo", "random"):
        assert cache_hits(trace, size, policy, seed) <= best  # type: ignore[arg-type]
    assert best <= len(trace) - len(set(trace))
    if size >= len(set(trace)):
        assert best == len(trace) - len(set(trace))


def best_possible(trace: list[int], size: int) -> int:
    """The most hits that any choice of evictions has: all of them are tried."""
    states = {frozenset[int](): 0}
    for expert in trace:
        after: dict[frozenset[int], int] = {}
        for cached, hits in states.items():
            if expert in cached:
                options = [cached]
            elif len(cached) < size:
                options = [cached | {expert}]
            else:
                options = [cached - {other} | {expert} for other in cached]
            for option in options:
                after[option] = max(after.get(option, 0), hits + (expert in cached))
        states = after
    return max(states.values())


@given(st.lists(st.integers(0, 4), max_size=16), st.integers(1, 4))
def test_belady_is_the_best(trace: list[int], size: int) -> None:
    assert cache_hits(trace, size, "belady") == best_possible(trace, size)


@given(traces, st.integers(1, 9))
def test_batches_hold_each_token_once(trace: list[int], budget: int) -> None:
    for form in (batches_in_order, batches_by_expert):
        batches = list(form(trace, budget))
        assert sorted(index for batch in batches for index in batch) == list(range(len(trace)))
        assert all(len(batch) == budget for batch in batches[:-1])


def test_the_longest_queue_comes_first_and_the_last_is_cut() -> None:
    trace = [0, 1, 1, 2, 1, 0]
    assert list(batches_by_expert(trace, 4)) == [[1, 2, 4, 0], [5, 3]]
    assert experts_per_batch(trace, batches_by_expert(trace, 3)) == 1.5
    assert experts_per_batch(trace, batches_in_order(trace, 3)) == 2.5


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="the cache must hold at least one expert, not 0"):
        cache_hits([1], 0, "lru")
    with pytest.raises(UsageError, match="unknown policy mru"):
        cache_hits([1], 1, "mru")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the batch must hold at least one token, not 0"):
        list(batches_by_expert([1], 0))
