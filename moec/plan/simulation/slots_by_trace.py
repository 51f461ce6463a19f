"""Slots of an expert store for each layer, and its policy, by replaying recorded routing."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from moec.errors import SetupError
from moec.plan.simulation.residency import EVICTIONS, Eviction, decode_hits, hit_rates, layer_hits
from moec.runtime.call.routing_trace import RoutingTrace
from moec.runtime.expert_store.native import POLICIES
from moec.runtime.expert_store.slots import LayerSize, MemoryLimit, slots_within

STEPS = 16
"""Numbers of slots of a layer that are replayed, evenly spaced."""


def slots_by_trace(
    trace: RoutingTrace, limit: MemoryLimit, layers: Sequence[LayerSize]
) -> tuple[list[int], Eviction]:
    """The slots of each layer within the limit, and the policy, with which the trace has the most
    hits. Layers whose choices are concentrated need fewer slots than others.

    Raises UsageError where the trace is of another model, or the limit holds less than one expert
    of each layer.
    """
    experts = [int(count) for count in trace.experts]
    of_model = [layer.experts for layer in layers]
    if experts != of_model:
        raise SetupError(
            f"the routing is of {len(experts)} layers with {_range(experts)} experts, and the "
            f"model has {len(of_model)} with {_range(of_model)}: record it with this model"
        )
    even = slots_within(limit, layers)
    share = sum(even) / sum(experts)
    rates = hit_rates(trace, [e for e in EVICTIONS if e.policy in POLICIES], (share,))
    best = max(rates, key=lambda eviction: rates[eviction])
    fitted = _by_gain(trace, best, limit.experts, layers)
    return (fitted if _hits(trace, fitted, best) > _hits(trace, even, best) else even), best


def _by_gain(
    trace: RoutingTrace, eviction: Eviction, room: int, layers: Sequence[LayerSize]
) -> list[int]:
    """From one slot each, the step with the most hits for its bytes that still fits, again and
    again."""
    slots = [1] * len(layers)
    left = room - sum(layer.expert_bytes for layer in layers)
    curves = [_curve(trace, n, layer.experts, eviction) for n, layer in enumerate(layers)]
    queue: list[tuple[float, int, int]] = []

    def push(n: int) -> None:
        """The best step of a layer that fits."""
        size = layers[n].expert_bytes
        steps = [
            ((curves[n][slots[n]] - hits) / ((count - slots[n]) * size), n, count)
            for count, hits in curves[n].items()
            if slots[n] < count <= slots[n] + left // size
        ]
        if steps:
            heapq.heappush(queue, min(steps))

    for n in range(len(layers)):
        push(n)
    while queue:
        _, n, count = heapq.heappop(queue)
        size = (count - slots[n]) * layers[n].expert_bytes
        if size <= left:
            slots[n], left = count, left - size
        push(n)
    return slots


def _curve(trace: RoutingTrace, layer: int, experts: int, eviction: Eviction) -> dict[int, int]:
    """The hits of a layer by its number of slots."""
    counts = sorted({1, *(round(experts * n / STEPS) or 1 for n in range(1, STEPS + 1))})
    return {count: layer_hits(trace, layer, count, eviction)[0] for count in counts}


def _hits(trace: RoutingTrace, slots: Sequence[int], eviction: Eviction) -> int:
    return sum(layer_hits(trace, n, count, eviction)[0] for n, count in enumerate(slots))


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


@dataclass(frozen=True)
class Speeds:
    """`disk`: bytes per second of reads of the artifact's experts, past the page cache or through
    it (`reading` is "direct" or "buffered"). `token`: seconds of a token where all weights are in
    memory, `measured`, or estimated by the bytes that it reads and the speed of memory."""

    disk: float
    reading: str
    token: float
    measured: bool


@dataclass(frozen=True)
class Residency:
    """A model in `memory` bytes, one text: `slots` of each layer, the share of needed experts that
    are in them (`hits`), the bytes that a token reads from the disk, and the seconds that it takes:
    those of a token with all weights in memory, and those of the reads, one after the other.
    `policy` is empty where every policy has as many hits."""

    memory: int
    slots: tuple[int, ...]
    policy: str
    hits: float
    read: float
    seconds: float


def expect(
    limit: MemoryLimit,
    layers: Sequence[LayerSize],
    top_k: Sequence[int],
    speeds: Speeds,
    trace: RoutingTrace | None,
) -> Residency:
    """The residency within a limit. Without a trace, all experts are equally likely, `top_k` of
    them in each layer: then the share of hits is that of the experts in slots.

    Raises UsageError where the limit is too small, or the trace is of another model.
    """
    if trace is None:
        slots, policy = slots_within(limit, layers), ""
        counts = [
            (k * n / layer.experts, float(k))
            for n, k, layer in zip(slots, top_k, layers, strict=True)
        ]
    else:
        slots, eviction = slots_by_trace(trace, limit, layers)
        policy = eviction.label
        counts = [decode_hits(trace, n, count, eviction) for n, count in enumerate(slots)]
    needed = sum(visits for _, visits in counts)
    read = sum(
        (visits - hits) * layer.expert_bytes
        for (hits, visits), layer in zip(counts, layers, strict=True)
    )
    return Residency(
        limit.bytes,
        tuple(slots),
        policy,
        sum(hits for hits, _ in counts) / needed if needed else 1.0,
        read,
        speeds.token + read / speeds.disk,
    )
