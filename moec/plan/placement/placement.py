"""Assigns experts to ranks, with copies of hot experts.

A slot holds one copy of an expert; the copies of an expert share its load equally. The greatest
load of a rank is at least the mean load, and at least the load of the greatest copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moec.errors import UsageError
from moec.ir.formats.jit import compiled
from moec.plan.placement.eplb import rebalance

EVEN = 1.001
"""Busiest rank over its lower bound, above which the placement of EPLB is tried too."""
Loads = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Placement:
    """`slots[r]` are the experts of rank r. `busiest` is the load of the busiest rank and `bound`
    its lower bound, as shares of all rows."""

    slots: tuple[tuple[int, ...], ...]
    busiest: float
    bound: float

    @property
    def ranks(self) -> int:
        return len(self.slots)

    @cached_property
    def most(self) -> int:
        """The greatest number of slots of a rank."""
        return max(map(len, self.slots))

    @property
    def imbalance(self) -> float:
        """The load of the busiest rank over the mean."""
        return self.busiest * self.ranks

    @property
    def bound_imbalance(self) -> float:
        """The least imbalance that any placement of these copies could have."""
        return self.bound * self.ranks


def place(loads: Loads, ranks: int, slots: int | None = None, restarts: int = 0) -> Placement:
    """Place experts with loads [E] on `ranks` ranks with `slots` slots in total (default: the
    fewest): greedily, then by swaps while they help, with `restarts` repetitions from a disturbed
    result; or as EPLB does if that is more even and has no expert twice on a rank.

    Raises UsageError for fewer slots than experts or ranks, or more than experts x ranks.
    """
    experts = len(loads)
    slots = max(experts, ranks) if slots is None else slots
    if slots < max(experts, ranks):
        raise UsageError(f"{slots} slots cannot hold {experts} experts on {ranks} ranks")
    if slots > experts * ranks:
        most = experts * ranks
        raise UsageError(f"{slots} slots: {experts} experts on {ranks} ranks fill {most}")
    total = float(loads.sum())
    shares = np.ascontiguousarray(loads / total if total > 0 else np.full(experts, 1 / experts))
    copies = replicate(shares, slots, ranks)
    owner = np.repeat(np.arange(experts), copies)
    weight = (shares / copies)[owner]
    capacity = np.full(ranks, slots // ranks, np.int64)
    capacity[: slots % ranks] += 1
    bound = max(1 / ranks, float(weight.max()))
    rank_of = _pack(weight, owner, capacity)
    rank_of = _improve(weight, owner, rank_of, ranks, bound, restarts)
    busiest = float(np.bincount(rank_of, weight, ranks).max())
    if busiest > bound * EVEN and slots % ranks == 0:
        table = rebalance(shares[None], slots, 1, 1, ranks)[0].reshape(ranks, -1)
        held = tuple(tuple(sorted(set(row))) for row in table.tolist())
        heaviest = float(rank_loads(shares, held).max())
        if heaviest < busiest and sum(map(len, held)) == slots:
            return Placement(held, heaviest, bound)
    experts_of = owner[np.lexsort((owner, rank_of))].tolist()
    ends = np.cumsum(np.bincount(rank_of, minlength=ranks)).tolist()
    held = tuple(tuple(experts_of[start:end]) for start, end in pairwise([0, *ends]))
    return Placement(held, busiest, bound)


def rank_loads(loads: Loads, slots: Sequence[Sequence[int]]) -> Loads:
    """The load of each rank with these slots, as a share of all rows [ranks]."""
    shares = loads / max(float(loads.sum()), 1e-300)
    experts = np.array([e for held in slots for e in held], np.int64)
    ranks = np.repeat(np.arange(len(slots)), list(map(len, slots)))
    copies = np.bincount(experts, minlength=len(loads))
    each = shares[experts] / copies[experts]
    return np.bincount(ranks, each, len(slots)).astype(np.float64, copy=False)


def replicate(shares: Loads, slots: int, most: int) -> Ids:
    """The number of copies of each expert [E], at most `most`, that makes the greatest copy
    smallest: each spare slot goes to the expert whose copies are the greatest."""
    copies: Ids = _replicate(shares, slots, most)
    return copies


@compiled
def _replicate(shares: Loads, slots: int, most: int) -> Ids:
    copies = np.ones(len(shares), np.int64)
    for _ in range(slots - len(shares)):
        best, greatest = 0, -1.0
        for expert in range(len(shares)):
            if copies[expert] < most and shares[expert] / copies[expert] > greatest:
                best, greatest = expert, shares[expert] / copies[expert]
        copies[best] += 1
    return copies


@compiled
def _pack(weight: Loads, owner: Ids, capacity: Ids) -> Ids:
    """The rank of each slot: the greatest weight first, each on the least loaded rank that has room
    and no copy of its expert."""
    ranks = len(capacity)
    load, room = np.zeros(ranks), capacity.copy()
    holds = np.zeros((ranks, owner.max() + 1), np.bool_)
    rank_of = np.zeros(len(weight), np.int64)
    for slot in np.argsort(-weight):
        best, fallback = -1, -1
        for rank in range(ranks):
            if room[rank] == 0:
                continue
            if fallback < 0 or load[rank] < load[fallback]:
                fallback = rank
            if not holds[rank, owner[slot]] and (best < 0 or load[rank] < load[best]):
                best = rank
        rank = best if best >= 0 else fallback
        rank_of[slot] = rank
        load[rank] += weight[slot]
        room[rank] -= 1
        holds[rank, owner[slot]] = True
    return rank_of


@compiled
def _swap_until_still(weight: Loads, rank_of: Ids, load: Loads, bound: float) -> None:
    """Swaps a slot of the busiest rank with a lighter one elsewhere, while that lowers the greater
    of the two loads."""
    for _ in range(len(weight) * 8):
        top = np.argmax(load)
        if load[top] <= bound * (1 + 1e-9):
            return
        best, one, two = load[top] * (1 - 1e-9), -1, -1
        for a in range(len(weight)):
            if rank_of[a] != top:
                continue
            for b in range(len(weight)):
                gain = weight[a] - weight[b]
                if rank_of[b] == top or gain <= 0:
                    continue
                pair = max(load[top] - gain, load[rank_of[b]] + gain)
                if pair < best:
                    best, one, two = pair, a, b
        if one < 0:
            return
        gain = weight[one] - weight[two]
        load[top] -= gain
        load[rank_of[two]] += gain
        rank_of[one], rank_of[two] = rank_of[two], rank_of[one]


@compiled
def _improve(
    weight: Loads, owner: Ids, rank_of: Ids, ranks: int, bound: float, restarts: int
) -> Ids:
    """The best result of swapping from `rank_of`, and from `restarts` disturbed results."""
    np.random.seed(0)
    best = rank_of.copy()
    load = _loads(weight, best, ranks)
    _swap_until_still(weight, best, load, bound)
    least = load.max()
    for _ in range(restarts):
        if least <= bound * (1 + 1e-9):
            break
        trial = best.copy()
        for _ in range(3):
            a, b = np.random.randint(len(trial)), np.random.randint(len(trial))
            trial[a], trial[b] = trial[b], trial[a]
        load = _loads(weight, trial, ranks)
        _swap_until_still(weight, trial, load, bound)
        if load.max() <= least:
            best, least = trial, load.max()
    return best


@compiled
def _loads(weight: Loads, rank_of: Ids, ranks: int) -> Loads:
    load = np.zeros(ranks)
    for slot in range(len(weight)):
        load[rank_of[slot]] += weight[slot]
    return load
