"""The replay gives the counts of a plain count of every row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.plans.replay import simulate
from moec.errors import UsageError
from moec.plan.inputs.model import read_model
from moec.plan.placement.placement import place
from moec.plan.plan import LayerPlan
from moec.plan.simulation.simulate import (
    alias_tables,
    draw_choices,
    drawn,
    tables,
    traffic,
)
from tests.plan.search.test_planner import planner


def layer(ranks: int, slices: int, copies: int, form: str, slots: int) -> LayerPlan:
    placement = place(np.arange(1.0, 7.0), ranks, slots)
    return LayerPlan(
        layer=0, experts=6, attention=1, ranks=ranks, slices=slices, copies=copies,
        form=form, slots=placement.slots, seconds={},
    )  # fmt: skip


@settings(max_examples=30)
@given(
    st.sampled_from(
        [
            (4, 1, 2, "flat", 7),
            (4, 2, 1, "coordinated", 6),
            (4, 1, 1, "rail", 8),
            (8, 1, 1, "deduplicated", 8),
            (4, 2, 1, "deduplicated", 8),
            (1, 1, 4, "flat", 6),
        ]
    ),
    st.integers(0, 40),
    st.integers(0, 9),
)
def test_equals_a_plain_count(
    shape: tuple[int, int, int, str, int], tokens: int, seed: int
) -> None:
    one = layer(*shape)
    devices = one.ranks * one.slices * one.copies
    node = 4 if shape[1:4] == (2, 1, "deduplicated") else 2
    ids = np.random.default_rng(seed).integers(-1, 7, (tokens, 3)).astype(np.int16)
    counts = traffic(ids, one, devices, node)
    first, holder = tables(one)
    rows = np.zeros(devices // one.slices, int)
    received = np.zeros(devices, int)
    nodes = 0
    for token in range(tokens):
        home = token * devices // tokens
        group = home // (one.ranks * one.slices)
        away = set()
        for choice, expert in enumerate(ids[token]):
            if not 0 <= expert < 6:
                continue
            held = holder[first[expert] : first[expert + 1]]
            rank = held[(token + choice) % len(held)]
            rows[group * one.ranks + rank] += 1
            base = (group * one.ranks + rank) * one.slices
            target = base + home % one.slices
            away.add(base // node)
            if one.form == "deduplicated":  # it arrives at the sender's place in the node
                received[target] += target != base // node * node + home % node
            else:
                received[target] += target != home
        away -= {home // node}
        nodes += len(away)
        if one.form == "deduplicated":
            for other in away:
                received[other * node + home % node] += 1
    assert np.array_equal(counts.rows, rows)
    assert np.array_equal(counts.got_inside + counts.got_across, received)
    assert counts.deduplicated == nodes
    assert counts.sent_across.sum() == counts.got_across.sum()
    if one.form == "deduplicated":
        assert counts.sent_across.sum() == nodes


def test_draws_have_their_shares() -> None:
    shares = np.array([0.5, 0.25, 0.125, 0.125])
    ids = draw_choices(*alias_tables(shares.copy()), 40_000, 1, 3)
    # Four standard deviations of a binomial of 40,000 draws.
    assert np.abs(np.bincount(ids.ravel(), minlength=4) / 40_000 - shares).max() < 0.01


def test_a_token_draws_different_experts() -> None:
    (ids,) = drawn([np.array([0.97, 0.01, 0.01, 0.01])], [4], 100)
    assert (np.sort(ids, axis=1) == np.arange(4)).all()


def test_routing_of_too_few_layers() -> None:
    p = planner(read_model("mixtral-8x7b"), 8)
    with pytest.raises(UsageError, match="fewer layers than the plan"):
        simulate(p.best(), p.cost, iter([]))
