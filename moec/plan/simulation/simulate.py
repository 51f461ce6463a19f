"""Counts the rows of routed tokens on the ranks of a plan, its nodes and links.

Tokens start on ranks in equal blocks. Counts are by rank, not by pair of ranks: memory is O(p) for
p ranks, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from moec.ir.formats.jit import compiled
from moec.plan.plan import LayerPlan, Sends
from moec.runtime.call.routing_trace import RoutingTrace

Counts = NDArray[np.int64]
Ids = NDArray[np.int16]


@dataclass(frozen=True)
class Traffic:
    """`rows` that each rank of an expert group computes [groups * EP]; rows that each device sends
    and receives inside its node and across nodes [p]; `rail_across`, rows across nodes by the
    device that forwards them in a staged exchange [p]; `deduplicated`, rows across nodes if each
    is sent once to a node, which is their number in a deduplicated exchange."""

    rows: Counts
    sent_inside: Counts
    sent_across: Counts
    got_inside: Counts
    got_across: Counts
    rail_across: Counts
    deduplicated: int

    @property
    def imbalance(self) -> float:
        """Rows of the busiest rank over the mean."""
        mean = float(self.rows.mean()) if self.rows.size else 0.0
        return float(self.rows.max()) / mean if mean else 1.0


def tables(layer: LayerPlan) -> tuple[Counts, Counts]:
    """(first, holders): the EP ranks of the copies of all experts, and where those of each expert
    begin in this list [E + 1]."""
    holders: list[list[int]] = [[] for _ in range(layer.experts)]
    for rank, slots in enumerate(layer.slots):
        for expert in slots:
            holders[expert].append(rank)
    first = np.cumsum([0, *map(len, holders)]).astype(np.int64)
    return first, np.array([rank for row in holders for rank in row], np.int64)


def traffic(ids: Ids, layer: LayerPlan, devices: int, node: int) -> Traffic:
    """Count the rows of ids [T, K]. Negative ids and those from E on belong to no expert."""
    first, holder = tables(layer)
    rail, once = layer.form in ("hierarchical", "rail"), layer.form == "deduplicated"
    spread = layer.form == "flat"
    arrays = _count(
        ids, first, holder, devices, node, layer.ranks, layer.slices, spread, rail, once
    )
    return Traffic(*arrays[:6], int(arrays[6][0]))


@compiled
def _count(
    ids: Ids,
    first: Counts,
    holder: Counts,
    devices: int,
    node: int,
    ranks: int,
    slices: int,
    spread: bool,
    staged: bool,
    deduplicated: bool,
) -> tuple[Counts, Counts, Counts, Counts, Counts, Counts, Counts]:
    """With `spread`, every slice of an expert receives the row; else only the sender's slice."""
    tokens, k = ids.shape
    span = ranks * slices
    rows = np.zeros(devices // slices, np.int64)
    sent_inside = np.zeros(devices, np.int64)
    sent_across = np.zeros(devices, np.int64)
    got_inside = np.zeros(devices, np.int64)
    got_across = np.zeros(devices, np.int64)
    rail_across = np.zeros(devices, np.int64)
    once = np.zeros(1, np.int64)
    nodes = np.empty(k, np.int32)
    experts = len(first) - 1
    node_of = (np.arange(devices) // node).astype(np.int32)
    for token in range(tokens):
        home = token * devices // tokens
        group, home_node, home_slice = home // span, home // node, home % slices
        low, high = (0, slices) if spread else (home_slice, home_slice + 1)
        distinct = 0
        for choice in range(k):
            expert = ids[token, choice]
            if expert < 0 or expert >= experts:
                continue
            copies = first[expert + 1] - first[expert]
            copy = 0 if copies == 1 else (token + choice) % copies
            rank = holder[first[expert] + copy]
            rows[group * ranks + rank] += 1
            base = group * span + rank * slices
            for part in range(low, high):
                target = base + part
                if target == home:
                    continue
                if node_of[target] == home_node:
                    sent_inside[home] += 1
                    got_inside[target] += 1
                    continue
                if deduplicated:
                    carrier = (node_of[target] - home_node) * node + home
                    if carrier != target:
                        sent_inside[carrier] += 1
                        got_inside[target] += 1
                    continue
                got_across[target] += 1
                if staged:
                    carrier = (home_node - node_of[target]) * node + target
                    rail_across[carrier] += 1
                    if carrier != home:
                        sent_inside[home] += 1
                else:
                    sent_across[home] += 1
            away = node_of[base]
            if away != home_node:
                fresh = True
                for index in range(distinct):
                    if nodes[index] == away:
                        fresh = False
                if fresh:
                    nodes[distinct] = away
                    distinct += 1
                    if deduplicated:
                        sent_across[home] += 1
                        got_across[(away - home_node) * node + home] += 1
        once[0] += distinct
    if staged:
        sent_across[:] = rail_across
    return rows, sent_inside, sent_across, got_inside, got_across, rail_across, once


def of_trace(trace: RoutingTrace) -> Iterator[Ids]:
    """The ids of each layer of a trace."""
    for layer in range(trace.layers):
        yield np.ascontiguousarray(trace.ids[:, layer])


def drawn(
    loads: Iterable[NDArray[np.float64]], k: Iterable[int], tokens: int, seed: int = 0
) -> Iterator[Ids]:
    """Ids [T, K] for each layer of loads: k different experts a token, drawn by their shares
    without replacement."""
    for index, (load, count) in enumerate(zip(loads, k, strict=True)):
        if len(load):
            threshold, other = alias_tables(load / load.sum())
            yield draw_choices(threshold, other, tokens, count, seed * 1_000_003 + index + 1)


def alias_tables(shares: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int16]]:
    """Tables of the alias method, by which a draw takes one random index and one comparison."""
    size = len(shares)
    threshold, other = shares * size, np.arange(size, dtype=np.int16)
    small = [i for i in range(size) if threshold[i] < 1]
    large = [i for i in range(size) if threshold[i] >= 1]
    while small and large:
        low, high = small.pop(), large.pop()
        other[low] = high
        threshold[high] -= 1 - threshold[low]
        (small if threshold[high] < 1 else large).append(high)
    for rest in (*small, *large):
        threshold[rest] = 1.0
    return threshold, other


@compiled
def draw_choices(
    threshold: NDArray[np.float64], other: NDArray[np.int16], tokens: int, k: int, seed: int
) -> Ids:
    """Draws by xorshift64*; after 64 duplicates the next free expert is taken."""
    state = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)
    size = len(threshold)
    ids = np.empty((tokens, k), np.int16)
    for token in range(tokens):
        for choice in range(k):
            tries = 0
            while True:
                state ^= state >> np.uint64(12)
                state ^= state << np.uint64(25)
                state ^= state >> np.uint64(27)
                bits = state * np.uint64(0x2545F4914F6CDD1D)
                high = np.int64(bits >> np.uint64(32))
                index = (high * size) >> 32
                low = np.float64(bits & np.uint64(0xFFFFFFFF)) / 4294967296.0
                expert = index if low < threshold[index] else np.int64(other[index])
                tries += 1
                if tries > 64:
                    expert = (expert + tries) % size
                duplicate = False
                for before in range(choice):
                    if ids[token, before] == expert:
                        duplicate = True
                if not duplicate:
                    ids[token, choice] = expert
                    break
    return ids


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
