"""The time left of a compilation comes from the last ones on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec import cache
from moec.commands.compilation.estimate import MOST, PastRun, expected, past_runs, remember

OTHERWISE = {"capture": 20.0, "kernels": 18.0, "verify": 3.0}


def test_without_runs_the_times_stay() -> None:
    assert expected([], 10**6, OTHERWISE) == OTHERWISE


def test_the_median_of_the_three_most_similar_sizes() -> None:
    runs = [
        PastRun(size, {"capture": capture, "kernels": 1.0})
        for size, capture in ((10**6, 2.0), (2 * 10**6, 4.0), (3 * 10**6, 5.0), (10**10, 900.0))
    ]
    assert expected(runs, 10**6, OTHERWISE) == {"capture": 4.0, "kernels": 1.0, "verify": 3.0}
    assert expected(runs, 10**11, OTHERWISE)["capture"] == 5.0


def test_of_equal_sizes_the_newest() -> None:
    runs = [PastRun(5, {"capture": float(number)}) for number in range(9)]
    assert expected(runs, 5, OTHERWISE)["capture"] == 7.0


@given(st.lists(st.integers(0, 2**45), max_size=9), st.integers(0, 2**45))
def test_sizes_of_any_kind(sizes: list[int], weights: int) -> None:
    runs = [PastRun(size, {"capture": 1.0}) for size in sizes]
    assert expected(runs, weights, OTHERWISE)["capture"] == (1.0 if runs else 20.0)


def test_the_newest_runs_are_remembered(tmp_path: Path) -> None:
    store = cache.store_in(tmp_path / "cache")
    for number in range(MOST + 3):
        remember(store, PastRun(number, {"capture": 0.5}))
    runs = past_runs(store)
    assert [run.weights for run in runs] == list(range(3, MOST + 3))
    assert runs[0].seconds == {"capture": 0.5}


@pytest.mark.parametrize("content", [b"[1]", b"not JSON", b'[{"weights": "many", "seconds": {}}]'])
def test_a_malformed_entry_has_no_runs(tmp_path: Path, content: bytes) -> None:
    store = cache.store_in(tmp_path / "cache")
    remember(store, PastRun(1, {}))
    (entry,) = cache.entries(store)
    cache.save(store, cache.RUNS, {entry.path.name: content})
    assert past_runs(store) == []
    assert past_runs(cache.Store(None)) == []
