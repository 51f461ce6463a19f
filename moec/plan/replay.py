"""Serving with experts that are known ahead: what a cache of experts hits, and what batches hold.

Where a router reads token ids alone, the experts of every queued token are known before any of them
runs (`hoist-routers`; Read-ME, arXiv 2410.19123). A cache can then evict the expert whose next use
is farthest (Belady, IBM Systems Journal 1966: no policy hits more often), and a batch can hold the
tokens of few experts. Both are replayed here on a trace, a list of expert ids in the order of use.
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
    """How many uses of `trace` find their expert in a cache of `size` experts, empty at first.

    Raises UsageError for a cache without room, or another policy.
    """
    if size < 1:
        raise UsageError(f"a cache holds one expert or more, not {size}")
    if policy not in ("belady", "lru", "fifo", "random"):
        raise UsageError(f"there is no policy {policy}: write belady, lru, fifo or random")
    following = next_uses(trace)
    generator = Random(seed)
    cached: dict[int, float] = {}  # by expert: what the policy ranks by, the least is evicted
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
    """When the expert of each use is used again; `NEVER` for the last time."""
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
    """The indices of `trace` in batches of `budget`: each takes the longest queue of one expert,
    then the next longest, until it is full; of the last one as many as fit (Read-ME)."""
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
        raise UsageError(f"a batch holds one token or more, not {budget}")
