"""Places experts that tokens choose together on one node, and there on one rank.

Where a row is sent once to each node that holds one of its experts, it then reaches fewer nodes. A
balanced placement is changed by swaps: first of all experts of two ranks, which changes no load,
then of single slots, so that no rank is busier than the busiest one was. Load above this limit has
a price, which is 0 at first and rises until no rank exceeds it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moec.errors import UsageError
from moec.ir.formats.jit import compiled
from moec.plan.placement.placement import Ids, Loads, Placement, rank_loads
from moec.runtime.call.routing_trace import RoutingTrace

SLACK = 1.005
"""Busiest rank after the swaps over busiest rank before them, at most."""
_SWEEPS = 4
_PRICES = (0.0, *(4.0**power for power in range(-2, 6)), np.inf)


def coactivation(trace: RoutingTrace, layer: int, experts: int | None = None) -> Ids:
    """[E, E]: the number of tokens that chose both experts; on the diagonal, each expert. E is the
    trace's number of experts, or `experts` if more exist than the trace knows."""
    return meetings(trace.ids[:, layer], experts or int(trace.experts[layer]))


def meetings(ids: NDArray[np.int16], experts: int) -> Ids:
    """The co-activation [E, E] of ids [T, K]; those below 0 are of no expert."""
    meets: Ids = _meetings(np.ascontiguousarray(ids), experts)
    return meets


@compiled
def _meetings(ids: NDArray[np.int16], experts: int) -> Ids:
    meets = np.zeros((experts, experts), np.int64)
    tokens, k = ids.shape
    chosen = np.empty(k, np.int64)
    for token in range(tokens):
        count = 0
        for choice in range(k):
            expert = np.int64(ids[token, choice])
            fresh = 0 <= expert < experts
            for before in range(count):
                fresh = fresh and chosen[before] != expert
            if fresh:
                chosen[count] = expert
                count += 1
        for one in range(count):
            for two in range(count):
                meets[chosen[one], chosen[two]] += 1
    return meets


def place_together(
    placement: Placement, loads: Loads, meets: NDArray[np.int64], node: int
) -> Placement:
    """The placement with experts moved by swaps, for loads [E] and co-activation [E, E]. `node`
    consecutive ranks share a node. The busiest rank has at most `SLACK` times its load before.

    Raises UsageError where `meets` is not [E, E].
    """
    owner, rank_of, weight, affinity = _slots(placement, loads, meets)
    limit = placement.busiest * SLACK
    node_of = np.arange(placement.ranks) // node
    anywhere, alone = np.zeros(placement.ranks, np.int64), np.arange(placement.ranks)
    rank_of = _swapped_ranks(affinity, rank_of, node_of)[rank_of]
    for unit_of, fence_of in ((node_of, anywhere), (alone, node_of)):
        strict = priced = rank_of
        for price in _PRICES:
            price *= float(affinity.sum())
            priced = _swap_slots(affinity, weight, owner, priced, unit_of, fence_of, limit, price)
        strict = _swap_slots(affinity, weight, owner, strict, unit_of, fence_of, limit, np.inf)
        fits = np.bincount(priced, weight).max() <= limit * (1 + 1e-9)
        candidates = [strict, priced] if fits else [strict]
        rank_of = max(candidates, key=lambda ranks: _inner_affinity(affinity, unit_of[ranks]))
    slots = tuple(tuple(sorted(owner[rank_of == rank].tolist())) for rank in range(placement.ranks))
    return replace(placement, slots=slots, busiest=float(rank_loads(loads, slots).max()))


def place_on_nodes(
    placement: Placement, loads: Loads, meets: NDArray[np.int64]
) -> tuple[tuple[int, ...], ...]:
    """The slots of a placement on nodes instead of ranks, with experts moved by swaps after which
    no node is busier than the limit: quicker than `place_together`, and not as near. Raises
    UsageError."""
    owner, node_of, weight, affinity = _slots(placement, loads, meets)
    alone, anywhere = np.arange(placement.ranks), np.zeros(placement.ranks, np.int64)
    limit = placement.busiest * SLACK
    node_of = _swap_slots(affinity, weight, owner, node_of, alone, anywhere, limit, np.inf)
    return tuple(tuple(owner[node_of == node].tolist()) for node in range(placement.ranks))


def _slots(
    placement: Placement, loads: Loads, meets: NDArray[np.int64]
) -> tuple[Ids, Ids, Loads, Loads]:
    """The expert, the rank and the load of each slot, and the affinity of each pair of slots."""
    if meets.shape != (len(loads), len(loads)):
        raise UsageError(f"co-activation of {meets.shape[0]} experts, loads of {len(loads)}")
    owner = np.array([expert for held in placement.slots for expert in held], np.int64)
    rank_of = np.repeat(np.arange(placement.ranks), [len(held) for held in placement.slots])
    copies = np.bincount(owner, minlength=len(loads))
    weight = (loads / max(float(loads.sum()), 1e-300) / copies)[owner]
    affinity = (meets / np.outer(copies, copies))[np.ix_(owner, owner)]
    affinity[owner[:, None] == owner[None, :]] = 0.0
    return owner, rank_of, weight, affinity


def _swapped_ranks(affinity: Loads, rank_of: Ids, node_of: Ids) -> Ids:
    """The new position of each rank, where all its slots go."""
    ranks = len(node_of)
    sums = np.zeros((ranks, ranks))
    np.add.at(sums, (rank_of[:, None], rank_of[None, :]), affinity)
    np.fill_diagonal(sums, 0.0)
    positions = np.arange(ranks)
    weightless, anywhere = np.zeros(ranks), np.zeros(ranks, np.int64)
    position: Ids = _swap_slots(
        sums, weightless, positions, positions, node_of, anywhere, 1.0, np.inf
    )
    return position


def _inner_affinity(affinity: Loads, unit_of_slot: Ids) -> float:
    """The affinity of all pairs of slots of one unit."""
    return float(affinity[unit_of_slot[:, None] == unit_of_slot[None, :]].sum())


@compiled
def _swap_slots(
    affinity: Loads, weight: Loads, owner: Ids, rank_of: Ids, unit_of: Ids, fence_of: Ids,
    limit: float, price: float,
) -> Ids:  # fmt: skip
    """The rank of each slot after swaps that raise the affinity within units of ranks less `price`
    times the loads above `limit`, between ranks of equal `fence_of`, where no rank gets an expert
    twice. With an infinite price, no swap raises a load above the limit."""
    slots, ranks = len(owner), len(unit_of)
    rank_of = rank_of.copy()
    load, pull = np.zeros(ranks), np.zeros((slots, unit_of.max() + 1))
    holds = np.zeros((ranks, owner.max() + 1), np.int64)
    for a in range(slots):
        load[rank_of[a]] += weight[a]
        holds[rank_of[a], owner[a]] += 1
        for b in range(slots):
            pull[a, unit_of[rank_of[b]]] += affinity[a, b]
    for _ in range(_SWEEPS):
        moved = False
        for a in range(slots):
            best, partner = 1e-9 * (1.0 + pull[a].sum()), -1
            for b in range(slots):
                one, two = rank_of[a], rank_of[b]
                here, there = unit_of[one], unit_of[two]
                if one == two or fence_of[one] != fence_of[two] or owner[a] == owner[b]:
                    continue
                gain = 0.0
                if here != there:
                    gain = pull[a, there] + pull[b, here] - pull[a, here] - pull[b, there]
                    gain -= 2 * affinity[a, b]
                if holds[two, owner[a]] or holds[one, owner[b]]:
                    continue
                shift = weight[a] - weight[b]
                above = max(0.0, load[one] - shift - limit) + max(0.0, load[two] + shift - limit)
                above -= max(0.0, load[one] - limit) + max(0.0, load[two] - limit)
                if price == np.inf:
                    gain = -1.0 if above > 0 else gain
                else:
                    gain -= price * above
                if gain > best:
                    best, partner = gain, b
            if partner < 0:
                continue
            moved = True
            one, two = rank_of[a], rank_of[partner]
            for slot, source, target in ((a, one, two), (partner, two, one)):
                load[source] -= weight[slot]
                load[target] += weight[slot]
                holds[source, owner[slot]] -= 1
                holds[target, owner[slot]] += 1
                rank_of[slot] = target
                for other in range(slots):
                    pull[other, unit_of[source]] -= affinity[other, slot]
                    pull[other, unit_of[target]] += affinity[other, slot]
        if not moved:
            break
    return rank_of
