"""Experts of a group are placed on ranks of their group."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.errors import UsageError
from moec.plan.placement.bound_experts import place_bound
from moec.plan.placement.placement import rank_loads

MODALITIES = {"text": [0, 3], "image": [1], "audio": [2, 4, 5]}
LOADS = np.array([5.0, 2.0, 1.0, 3.0, 1.0, 1.0])


def test_each_expert_is_on_a_rank_of_its_group() -> None:
    bound = place_bound(LOADS, MODALITIES, 4)
    assert {name: list(ranks) for name, ranks in bound.ranks.items()} == {
        "text": [0, 1],
        "image": [2],
        "audio": [3],
    }  # text has 8 of 13: the rank to spare is its
    assert bound.placement.slots == ((0,), (3,), (1,), (2, 4, 5))
    assert bound.placement.busiest == pytest.approx(5 / 13)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 2), min_size=3, max_size=12), st.integers(3, 8), st.integers(0, 99))
def test_any_groups(which: list[int], ranks: int, seed: int) -> None:
    loads = np.random.default_rng(seed).random(len(which)) + 0.01
    groups = {str(g): [e for e, other in enumerate(which) if other == g] for g in set(which)}
    bound = place_bound(loads, groups, ranks)
    assert [rank for part in bound.ranks.values() for rank in part] == list(range(ranks))
    for name, part in bound.ranks.items():
        assert {e for rank in part for e in bound.placement.slots[rank]} == set(groups[name])
    busiest = rank_loads(loads, bound.placement.slots).max()
    assert bound.placement.busiest == pytest.approx(busiest)
    assert bound.placement.bound <= busiest * (1 + 1e-9)


@pytest.mark.parametrize(
    ("groups", "ranks", "words"),
    [
        (
            {"a": [0, 1], "b": [1, 2, 3, 4, 5]},
            4,
            "expert 1 is in 2 groups; each of",
        ),
        ({"a": [0, 1]}, 4, "expert 2 is in 0 groups"),
        ({**MODALITIES, "video": [7]}, 4, "expert 7 is in 1 groups"),
        (MODALITIES, 2, "3 groups cannot have separate ranks among 2"),
    ],
)
def test_refused(groups: dict[str, list[int]], ranks: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        place_bound(LOADS, groups, ranks)
