"""The cost of an exchange of rows between the ranks of a group: hops, bytes and seconds.

n ranks in a group, G of them in each node, N = n/G nodes, V bytes that a rank sends to all ranks in
total, including itself. Bytes are those that leave a rank in one direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Literal

from moec.plan.inputs.model import Layers
from moec.plan.network.cluster import Cluster

Form = Literal["flat", "hierarchical", "rail", "deduplicated", "coordinated"]
FORMS: tuple[Form, ...] = ("flat", "hierarchical", "rail", "deduplicated", "coordinated")
STAGED: tuple[Form, ...] = ("hierarchical", "rail", "deduplicated")
"""The forms with a stage inside nodes and a stage between them."""
CALLS = 2
"""Rounds of an exchange in one direction, as the mean of both: counts, rows and slots on the way
out, rows on the way back. One-sided rows without stages need one round: their buffers have room for
any number of rows."""


@dataclass(frozen=True)
class Exchange:
    """One direction of an exchange: the messages that a rank sends, the bytes that it sends inside
    its node and across nodes, and the bytes that it copies in its own memory. With `staged`, rows
    change ranks between nodes and inside them one after the other; with `forwarded`, a row needs
    not wait for others between them."""

    hops_inside: int
    hops_across: int
    bytes_inside: float
    bytes_across: float
    bytes_copied: float = 0.0
    staged: bool = False
    forwarded: bool = False

    @property
    def published_hops(self) -> int:
        """Hops as DeepSpeed-MoE counts them, including the message of a rank to itself."""
        return self.hops_inside + self.hops_across + 1


def flat(ranks: int, node: int, volume: float) -> Exchange:
    """All ranks to all ranks: n - 1 messages."""
    node = min(node, ranks)
    inside, across = node - 1, ranks - node
    return Exchange(inside, across, volume * inside / ranks, volume * across / ranks)


def hierarchical(ranks: int, node: int, volume: float) -> Exchange:
    """Inside the node first, then across nodes, with a change of layout before each (DeepSpeed-MoE,
    arXiv 2201.05596, section 5.3): O(G + n/G) messages, twice the volume."""
    node = min(node, ranks)
    nodes = ranks // node
    return Exchange(
        node - 1,
        nodes - 1,
        volume * (node - 1) / node,
        volume * (nodes - 1) / nodes,
        bytes_copied=2 * volume,
        staged=True,
    )


def rail_aligned(ranks: int, node: int, volume: float, busiest_rail: float = 1.0) -> Exchange:
    """Inside the node to the rank with the local number of the destination, then only between ranks
    of equal local numbers (SE-MoE, arXiv 2205.10034): the hops of `hierarchical`, with the bytes of
    the busiest rail, which has `busiest_rail` times the mean."""
    plain = hierarchical(ranks, node, volume)
    return Exchange(
        plain.hops_inside,
        plain.hops_across,
        plain.bytes_inside,
        plain.bytes_across * busiest_rail,
        bytes_copied=volume,
        staged=True,
    )


def deduplicated(ranks: int, node: int, volume: float, away: float) -> Exchange:
    """To each node once, between ranks of equal local numbers, and inside the node to each expert
    (DeepEP). `away` is the number of other nodes that a token goes to, over its k experts; on the
    way back, each node sends the sum of its experts."""
    plain = hierarchical(ranks, node, volume)
    return Exchange(
        plain.hops_inside,
        plain.hops_across,
        plain.bytes_inside,
        volume * away,
        bytes_copied=2 * volume,
        staged=True,
        forwarded=True,
    )


def coordinated(ranks: int, node: int, slices: int, volume: float) -> Exchange:
    """Among the n/L ranks of equal slice only, where slicing of degree L makes the rows of L ranks
    equal (DeepSpeed-MoE, section 5.3). The all-gather of the rows is counted separately."""
    return flat(ranks // slices, max(1, node // slices), volume)


def exchange(form: Form, ranks: int, node: int, volume: float, away: float = 1.0) -> Exchange:
    """The exchange of a form among `ranks` ranks, `node` of which share a node; `away` is that of
    `deduplicated`."""
    match form:
        case "hierarchical":
            return hierarchical(ranks, node, volume)
        case "rail":
            return rail_aligned(ranks, node, volume)
        case "deduplicated":
            return deduplicated(ranks, node, volume, away)
        case _:
            return flat(ranks, node, volume)


def seconds(step: Exchange, cluster: Cluster, span: int) -> float:
    """Seconds of one direction, for a group whose ranks are among `span` neighbouring devices."""
    inside, across = cluster.levels[0], cluster.level_of(span)
    near = step.bytes_inside / inside.share()
    far = step.bytes_across / across.share()
    copied = 2 * step.bytes_copied / cluster.device.copy_bandwidth
    if cluster.one_sided is None:
        stages = (inside, across) if step.staged else (across,)
        calls = sum(CALLS * level.call_seconds for level in stages)
        latency = step.hops_inside * inside.latency.value + step.hops_across * across.latency.value
        return calls + latency + copied + (near + far if step.staged else max(near, far))
    kernel = cluster.one_sided.value
    hops = ((inside, step.hops_inside), (across, step.hops_across))
    least = [level.latency.value for level, messages in hops if messages]
    if not least:
        return 0.0
    if not step.staged:
        return kernel + max(least) + max(near, far)
    if step.forwarded:
        return CALLS * (kernel + sum(least)) + max(near, far)
    return CALLS * (2 * kernel + sum(least)) + copied + near + far


def collective_seconds(kind: str, size: float, ranks: int, span: int, cluster: Cluster) -> float:
    """Seconds of an all_gather, reduce_scatter or all_reduce of `size` bytes in total on `ranks`
    ranks within `span` devices: (n-1)/n of the bytes over the slowest link, twice that for
    all_reduce."""
    if ranks == 1:
        return 0.0
    level = cluster.level_of(span)
    times = 2 if kind == "all_reduce" else 1
    least = level.call_seconds + (ranks - 1) * level.latency.value
    return times * (least + size * (ranks - 1) / ranks / level.share())


def distinct_nodes(experts: int, k: int, nodes: int) -> float:
    """The expected number of `nodes` that hold a token's k experts, if all choices are equally
    likely: N (1 - C(E - E/N, k) / C(E, k))."""
    each = max(1, experts // nodes)
    return nodes * (1 - comb(experts - each, k) / comb(experts, k))


def even_away(layer: Layers, nodes: int) -> float:
    """The number of other nodes that a token goes to, over k, if all choices are equally likely.
    With experts in groups, they are of the same few groups, and neighbouring groups share nodes."""
    groups, chosen = layer.groups, layer.k_groups
    if groups <= nodes:
        among = max(1, nodes * chosen // groups)
        distinct = distinct_nodes(layer.experts * chosen // groups, layer.k, among)
    else:
        each, more = divmod(groups, nodes)
        distinct = (nodes - more) * _reached(layer, each) + more * _reached(layer, each + 1)
    return distinct * (nodes - 1) / nodes / layer.k


def _reached(layer: Layers, of_node: int) -> float:
    """The probability that a token has an expert on a node that holds so many groups."""
    groups, chosen, size = layer.groups, layer.k_groups, layer.experts // layer.groups
    missed = sum(
        comb(of_node, here) * comb(groups - of_node, chosen - here)
        * comb(size * (chosen - here), layer.k)
        for here in range(min(of_node, chosen) + 1)
    )  # fmt: skip
    return 1 - missed / (comb(groups, chosen) * comb(size * chosen, layer.k))
