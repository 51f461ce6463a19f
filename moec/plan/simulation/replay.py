"""Simulates serving where the experts of queued tokens are known in advance: caches and batches.

Where a router reads only token ids, the experts of every queued token are known before the model
runs (`hoist-routers`; Read-ME, arXiv 2410.19123). A cache can then evict the expert whose next use
is farthest (Belady, IBM Systems Journal 1966: no policy hits more often), and a batch can be formed
of tokens of few experts. A trace is a list of expert ids in the order of use.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from random import Random
from typing import Literal

from moec.errors import UsageError

Policy = Literal["belady", "lru", "fifo", "random"]
NEVER = float("inf")


def cache_hits(trace: Sequence[int], size: int, policy: Policy, seed: int = 0) -> int:
    """The number of uses in `trace` that hit a cache of `size` experts, which is empty at first.

    Raises UsageError for a cache without room or an unknown policy.
    """
    if size < 1:
        raise UsageError(f"the cache must hold at least one expert, not {size}")
    if policy not in ("belady", "lru", "fifo", "random"):
        raise UsageError(f"unknown policy {policy}: write belady, lru, fifo or random")
    following = next_uses(trace)
    generator = Random(seed)
    cached: dict[int, float] = {}  # by expert: its rank in the policy; the least is evicted
    hits = 0
    for time, expert in enumerate(trace):
        hit = expert in cached
        hits += hit
        if not hit and len(cached) == size:
            del cached[min(cached, key=cached.__getitem__)]
        if policy == "belady":
            cached[expert] = -following[time]
        elif policy == "lru" or not hit:
            cached[expert] = generator.random() if policy == "random" else time
    return hits


def next_uses(trace: Sequence[int]) -> list[float]:
    """For each use, the time of the next use of the same expert; `NEVER` if there is none."""
    later: dict[int, float] = {}
    following = []
    for time in reversed(range(len(trace))):
        following.append(later.get(trace[time], NEVER))
        later[trace[time]] = time
    return following[::-1]


def batches_in_order(trace: Sequence[int], budget: int) -> Iterator[list[int]]:
    """The indices of `trace` in batches of `budget`, first come, first served."""
    _check_budget(budget)
    for start in range(0, len(trace), budget):
        yield list(range(start, min(start + budget, len(trace))))


def batches_by_expert(trace: Sequence[int], budget: int) -> Iterator[list[int]]:
    """The indices of `trace` in batches of `budget`. Each batch takes the longest queue of one
    expert, then the next longest, until it is full; of the last queue as many as fit (Read-ME)."""
    _check_budget(budget)
    queues: dict[int, deque[int]] = defaultdict(deque)
    for index, expert in enumerate(trace):
        queues[expert].append(index)
    while queues:
        batch: list[int] = []
        while queues and len(batch) < budget:
            expert = max(queues, key=lambda name: len(queues[name]))
            queue = queues[expert]
            batch += [queue.popleft() for _ in range(min(len(queue), budget - len(batch)))]
            if not queue:
                del queues[expert]
        yield batch


def experts_per_batch(trace: Sequence[int], batches: Iterator[list[int]]) -> float:
    """The mean number of different experts in a batch."""
    counts = [len({trace[index] for index in batch}) for batch in batches]
    return sum(counts) / max(1, len(counts))


def _check_budget(budget: int) -> None:
    if budget < 1:
        raise UsageError(f"the batch must hold at least one token, not {budget}")
