"""Counts to how many other nodes and ranks a row of a trace goes, if it is sent once to each."""

from __future__ import annotations

from msgspec.structs import replace

from moec.plan.plan import LayerPlan, Sends
from moec.plan.simulation.simulate import Ids, traffic
from moec.runtime.call.routing_trace import RoutingTrace

SAMPLE = 32_768
"""Tokens of a trace that are counted, at most."""


def sample(trace: RoutingTrace) -> RoutingTrace:
    """At most `SAMPLE` tokens, evenly spaced."""
    return trace.part(slice(None, None, max(1, -(-trace.tokens // SAMPLE))))


def count_sends(
    ids: Ids, layer: LayerPlan, by_load: tuple[tuple[int, ...], ...], devices: int, node: int
) -> Sends:
    """For ids [T, K], the slots of `layer`, and other slots `by_load` of the same ranks. A node
    has `node` devices."""
    nodes, nodes_by_load, ranks, ranks_by_load = (
        traffic(ids, replace(layer, slots=slots), devices, size).deduplicated / max(1, len(ids))
        for size in (node, layer.slices)
        for slots in (layer.slots, by_load)
    )
    return Sends(nodes=nodes, ranks=ranks, nodes_by_load=nodes_by_load, ranks_by_load=ranks_by_load)
