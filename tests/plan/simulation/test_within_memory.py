"""What is expected of a model of which a part is in memory."""

from __future__ import annotations

import numpy as np
import pytest

from moec.errors import UsageError
from moec.plan.simulation.residency import Eviction, decode_hits
from moec.plan.simulation.slots_by_trace import Residency, Speeds, expect
from moec.runtime.call.routing_trace import RoutingTrace
from moec.runtime.expert_store.slots import LayerSize, MemoryLimit
from tests.plan.simulation.test_residency import WORKING, trace_of

EXPERT = 1 << 20
SPEEDS = Speeds(disk=1e9, reading="direct", token=0.01, measured=True)
LAYERS = [LayerSize(8, EXPERT)] * 2


def expected(slots: int, trace: RoutingTrace | None = None) -> Residency:
    limit = MemoryLimit(WORKING + 2 * slots * EXPERT, 0, 0)
    return expect(limit, LAYERS, [2, 2], SPEEDS, trace)


def test_without_a_trace_hits_are_the_share_in_slots():
    row = expected(2)
    assert (row.slots, row.policy, row.hits) == ((2, 2), "", 0.25)
    assert row.read == 2 * 2 * 0.75 * EXPERT  # two layers, two experts of each
    assert row.seconds == 0.01 + row.read / 1e9


def test_all_in_slots_reads_nothing():
    assert (expected(8).hits, expected(8).read, expected(8).seconds) == (1.0, 0.0, 0.01)


def test_with_a_trace_the_second_half_counts():
    """The first half chooses 0 and 1, the second 2 and 3 from its second step on."""
    ids = np.array([[0, 1]] * 7 + [[2, 3]] * 5)[:, None].repeat(2, 1)
    row = expected(2, trace_of(ids, 8))
    assert row.hits == pytest.approx(5 / 6)  # of six steps, one misses both
    assert row.read == pytest.approx(2 * 2 * EXPERT / 6)


def test_steps_that_read_a_prompt_fill_slots_and_do_not_count():
    ids = np.array([[0, 1]] * 6)[:, None]
    trace = trace_of(ids, 8)
    assert decode_hits(trace, 0, 2, Eviction("lru")) == (2.0, 2.0)
    prompts = RoutingTrace(
        trace.ids, trace.step, np.zeros(6, np.uint8), trace.request, trace.experts
    )
    with pytest.raises(UsageError, match="second half of the trace has no steps that continue"):
        decode_hits(prompts, 0, 2, Eviction("lru"))


def test_a_limit_that_is_too_small_says_what_is_needed():
    with pytest.raises(UsageError, match=r"this model needs .* for one expert of each layer"):
        expected(0)
