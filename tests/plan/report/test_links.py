"""The picture of a plan has the rows of every link."""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace

from moec.commands.plan import link_loads
from moec.plan.placement.placement import place
from moec.plan.plan import LayerPlan
from tests.plan.search.test_reach import halves, planner


def test_rows_that_leave_or_reach_a_node() -> None:
    """16 experts of 64 on each of four nodes: a token sends a row to each other node once."""
    p = planner(halves()[0])
    layer = LayerPlan(
        layer=0, experts=64, attention=1, ranks=32, form="deduplicated",
        slots=place(p.loads[0], 32, 64).slots, seconds={},
    )  # fmt: skip
    plan = replace(p.plan([p.candidates[0][0].degrees], 0.0), layers=(layer,))
    (loads,) = link_loads(plan, p)
    (ids,) = halves()[0].ids.transpose(1, 0, 2)
    node_of = np.empty(64, int)
    for rank, slots in enumerate(layer.slots):
        node_of[list(slots)] = rank // 8
    sent = np.zeros((4, 4), int)
    for token, chosen in enumerate(ids):
        home = token * 32 // len(ids) // 8
        for node in set(node_of[chosen].tolist()) - {home}:
            sent[home, node] += 1
    assert loads.tolist() == np.maximum(sent.sum(0), sent.sum(1)).tolist()


def test_devices_of_one_node_without_a_trace() -> None:
    p = planner(None)
    plan = p.plan([p.candidates[0][0].degrees], 0.0)
    (loads,) = link_loads(replace(plan, node_size=32), p)
    assert loads.shape == (32,)
