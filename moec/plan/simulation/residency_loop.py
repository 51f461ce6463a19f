"""The loop of residency.py, compiled by numba; in a file of its own, as importing it takes long."""

from __future__ import annotations

from typing import Any

import numpy as np

from moec.ir.formats.jit import compiled

LRU, LFU, SLRU, PINNED, BELADY = range(5)
_SAFE = 0.8


@compiled
def replay(needed: Any, slots: int, policy: int, half_life: int, window: int) -> Any:
    """The hits of each step, i64[steps], of steps that need experts, bool[steps, E]."""
    steps, experts = needed.shape
    inside = np.zeros(experts, np.bool_)
    safe = np.zeros(experts, np.bool_)
    last = np.full(experts, -1)
    score = np.zeros(experts)
    fixed = np.zeros(experts, np.bool_)
    if policy == PINNED:
        fixed[np.argsort(-needed.sum(0), kind="mergesort")[: slots - 1]] = True
    hits = np.zeros(steps, np.int64)
    turn = np.zeros(experts, np.int64)  # of an expert that the step needs: hits come first
    held = 0
    for step in range(steps):
        for e in range(experts):
            if needed[step, e]:
                turn[e] = e if inside[e] else experts + e
                if inside[e]:
                    hits[step] += 1
                    safe[e] = policy == SLRU
                age = step - last[e]
                score[e] = 1 + score[e] * 0.5 ** (age / half_life)
                last[e] = step
        while safe.sum() > int(_SAFE * slots):
            oldest = -1
            for e in range(experts):
                if safe[e] and (oldest < 0 or last[e] < last[oldest]):
                    oldest = e
            safe[oldest] = False
        for e in range(experts):
            if not needed[step, e] or turn[e] < experts:
                continue
            if held == slots:
                victim, least = -1, 0.0
                for other in range(experts):
                    if not inside[other]:
                        continue
                    worth = last[other] * 1e-9
                    if policy == LFU:
                        age = step - last[other]
                        worth += score[other] * 0.5 ** (age / half_life)
                    elif policy == SLRU:
                        worth += safe[other]
                    elif policy == PINNED:
                        worth += fixed[other] * 1e6
                    elif policy == BELADY:
                        ahead = step + 1
                        while ahead < min(steps, step + 1 + window) and not needed[ahead, other]:
                            ahead += 1
                        worth -= ahead - step
                    # What this step needs leaves last, in the order of its products.
                    if needed[step, other]:
                        worth += 1e12 + turn[other]
                    if victim < 0 or worth < least:
                        victim = other
                        least = worth
                inside[victim] = False
                safe[victim] = False
                held -= 1
            inside[e] = True
            held += 1
    return hits
