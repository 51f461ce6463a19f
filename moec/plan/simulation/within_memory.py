"""What a model of which a part is in memory is expected to do, from replays and speeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moec.plan.simulation.residency import decode_hits
from moec.plan.simulation.slots_by_trace import slots_by_trace
from moec.runtime.call.routing_trace import RoutingTrace
from moec.runtime.expert_store.slots import LayerSize, MemoryLimit, slots_within


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
