"""Replays recorded routing with a part of the experts in memory: how often a chosen one is there.

Each layer has some slots. A step (one token of each text that is decoded) needs the experts that
its tokens choose; those that are in slots are hits, the others replace experts that the step does
not need:

    lru       the one that was not used for longest
    lfu       the one with the fewest uses, each of which counts half after `half_life` steps
    slru      as lru, but what was used twice while in memory, at most 4/5 of the slots, goes last
    pinned    the most used ones of the whole trace stay, but for one slot
    belady    the one whose next use is farthest, as far as the next `window` steps show (Belady,
              IBM Systems Journal 1966), else as lru

The expert store (`moec.runtime.expert_store`) runs lru, lfu and slru.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moec.errors import SetupError
from moec.runtime.call.recorder import DECODED
from moec.runtime.call.routing_trace import RoutingTrace

POLICIES = ("lru", "lfu", "slru", "pinned", "belady")
SHARES = (0.125, 0.25, 0.5, 0.75)
"""Of the experts that are in memory."""


@dataclass(frozen=True)
class Eviction:
    """A policy. `half_life` is that of lfu, `window` that of belady, both in steps."""

    policy: str
    half_life: int = 16
    window: int = 16

    @property
    def label(self) -> str:
        number = {"lfu": self.half_life, "belady": self.window}.get(self.policy)
        return self.policy if number is None else f"{self.policy} {number}"


EVICTIONS = (
    Eviction("lru"),
    Eviction("slru"),
    *(Eviction("lfu", half_life=steps) for steps in (16, 64, 256)),
    Eviction("pinned"),
    *(Eviction("belady", window=steps) for steps in (1, 4, 16, 64)),
)


def hit_rates(
    trace: RoutingTrace, evictions: Sequence[Eviction] = EVICTIONS, shares: Sequence[float] = SHARES
) -> Mapping[Eviction, tuple[float, ...]]:
    """For each policy, the share of needed experts that were in memory, by share of the experts
    that are."""
    rates = {}
    for eviction in evictions:
        rows = []
        for share in shares:
            slots = [max(1, round(share * int(n))) for n in trace.experts]
            counts = [layer_hits(trace, n, slots[n], eviction) for n in range(trace.layers)]
            visits = sum(count for _, count in counts)
            rows.append(sum(hits for hits, _ in counts) / max(1, visits))
        rates[eviction] = tuple(rows)
    return rates


def layer_hits(trace: RoutingTrace, layer: int, slots: int, eviction: Eviction) -> tuple[int, int]:
    """The hits of a layer with that many slots, all empty at first, and the experts that its steps
    needed."""
    hits, visits = _hits_of_steps(trace, layer, slots, eviction)
    return int(hits.sum()), int(visits.sum())


def decode_hits(
    trace: RoutingTrace, layer: int, slots: int, eviction: Eviction
) -> tuple[float, float]:
    """As `layer_hits`, per step and of steps of the decode phase only; those of the other half are
    replayed to fill the slots, and not counted."""
    hits, visits = _hits_of_steps(trace, layer, slots, eviction)
    steps, first = np.unique(trace.step, return_index=True)
    decode = trace.phase[first] == DECODED
    decode[: len(steps) // 2] = False
    if not decode.any():
        raise SetupError("the second half of the trace has no steps that continue a text")
    return float(hits[decode].mean()), float(visits[decode].mean())


def _hits_of_steps(
    trace: RoutingTrace, layer: int, slots: int, eviction: Eviction
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    from moec.plan.simulation.residency_loop import replay

    needed = _needed(trace, layer)
    policy = POLICIES.index(eviction.policy)
    hits = replay(needed, slots, policy, eviction.half_life, eviction.window)
    return hits, needed.sum(1)


def _needed(trace: RoutingTrace, layer: int) -> NDArray[np.bool_]:
    """Which experts each step of a layer needs, bool[steps, E]."""
    _, steps = np.unique(trace.step, return_inverse=True)
    needed = np.zeros((int(steps.max(initial=-1)) + 1, int(trace.experts[layer])), np.bool_)
    ids = trace.ids[:, layer]
    rows = np.broadcast_to(steps[:, None], ids.shape)
    needed[rows[ids >= 0], ids[ids >= 0]] = True
    return needed
