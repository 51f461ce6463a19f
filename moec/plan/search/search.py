"""Finds the quickest choice for each layer under a memory limit, exactly, by dynamic programming.

A choice costs seconds and bytes; the seconds between two layers depend on the states of their
choices. Among partial plans that end in one state, those are kept that no other beats in both
seconds and bytes, and that can still become a plan within the limit and quicker than the best
known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
_ROUNDING = 1e-9


@dataclass(frozen=True)
class LayerOption:
    """One option of a layer; the cost of the step to the next layer depends on `state`."""

    state: int
    seconds: float
    memory: float


@dataclass(frozen=True)
class Best:
    """The index of the choice of each layer, and their total cost."""

    indices: tuple[int, ...]
    seconds: float
    memory: float


@dataclass(frozen=True)
class _Front:
    """Partial plans that end in one state; none beats another in both seconds and bytes."""

    seconds: Numbers
    memory: Numbers
    previous: NDArray[np.int64]  # [n, 3]: previous state, its entry, choice


def search(
    layers: Sequence[Sequence[LayerOption]],
    between: Callable[[int, int], float],
    limit: float,
) -> Best | None:
    """The quickest plan whose bytes stay within `limit`, and among equally quick ones the one of
    fewer bytes; None where there is none."""
    if not layers:
        return Best((), 0.0, 0.0)
    states = sorted({choice.state for layer in layers for choice in layer})
    steps = np.array([[between(one, two) for two in states] for one in states])
    options = [[_useful(layer, state) for state in states] for layer in layers]
    least_seconds = _to_go(options, steps, 1.0, 0.0)
    least_memory = _to_go(options, np.zeros_like(steps), 0.0, 1.0)
    most = _feasible_seconds(options, steps, limit)
    if most is None:
        return None
    fronts: list[list[_Front]] = []
    for index, layer in enumerate(options):
        row = []
        for at, entries in enumerate(layer):
            parts = list(_extended(fronts[-1] if fronts else None, steps[:, at], entries))
            last = index + 1 == len(options)
            rest = 0.0 if last else float((least_seconds[index + 1] + steps[at]).min())
            bytes_left = 0.0 if last else float(least_memory[index + 1].min())
            row.append(_pareto(parts, most - rest, limit - bytes_left))
        fronts.append(row)
    return _trace(fronts)


def _useful(layer: Sequence[LayerOption], state: int) -> list[tuple[float, float, int]]:
    """(seconds, bytes, index) of the choices with a state that no other beats, quickest first."""
    entries = sorted(
        (choice.seconds, choice.memory, index)
        for index, choice in enumerate(layer)
        if choice.state == state
    )
    front: list[tuple[float, float, int]] = []
    for entry in entries:
        if not front or entry[1] < front[-1][1]:
            front.append(entry)
    return front


def _to_go(
    options: Sequence[Sequence[Sequence[tuple[float, float, int]]]],
    steps: Numbers,
    time: float,
    memory: float,
) -> list[Numbers]:
    """The least weighted cost from each layer to the end, by the state of the layer."""
    rows: list[Numbers] = []
    for layer in reversed(options):
        each = np.array(
            [min((time * s + memory * m for s, m, _ in row), default=np.inf) for row in layer]
        )
        if rows:
            each = each + (time * steps + rows[-1][None, :]).min(axis=1)
        rows.append(each)
    return rows[::-1]


def _feasible_seconds(
    options: Sequence[Sequence[Sequence[tuple[float, float, int]]]], steps: Numbers, limit: float
) -> float | None:
    """Seconds of a plan within the limit, near the best, found by bisecting a price of bytes; None
    where no plan is within the limit."""
    price, best = 0.0, None
    low, high = 0.0, None
    for _ in range(60):
        seconds, memory = _priced(options, steps, price)
        if memory <= limit:
            best = seconds if best is None else min(best, seconds)
            if price == 0.0:
                return best
            high = price
        else:
            low = price
        price = (low + high) / 2 if high is not None else max(1e-15, price * 4)
    if best is None:
        seconds, memory = _priced(options, steps, np.inf)
        best = seconds if memory <= limit else None
    return best


def _priced(
    options: Sequence[Sequence[Sequence[tuple[float, float, int]]]], steps: Numbers, price: float
) -> tuple[float, float]:
    """Seconds and bytes of the cheapest plan at a price of bytes."""
    time, rate = (0.0, 1.0) if price == np.inf else (1.0, price)
    costs = _to_go(options, steps, time, rate)
    state = int(costs[0].argmin())
    seconds = memory = 0.0
    for index, layer in enumerate(options):
        spent, held, _ = min(layer[state], key=lambda e: (time * e[0] + rate * e[1], e[1]))
        seconds, memory = seconds + spent, memory + held
        if index + 1 < len(options):
            following = int((time * steps[state] + costs[index + 1]).argmin())
            seconds += steps[state, following]
            state = following
    return seconds, memory


def _extended(
    fronts: Sequence[_Front] | None,
    step: Numbers,
    entries: Sequence[tuple[float, float, int]],
) -> list[_Front]:
    if fronts is None:
        return [
            _Front(np.array([s]), np.array([m]), np.array([[-1, -1, index]]))
            for s, m, index in entries
        ]
    parts = []
    for state, front in enumerate(fronts):
        size = len(front.seconds)
        for spent, held, index in entries:
            previous = np.empty((size, 3), np.int64)
            previous[:, 0], previous[:, 1], previous[:, 2] = state, np.arange(size), index
            parts.append(
                _Front(front.seconds + (spent + step[state]), front.memory + held, previous)
            )
    return parts


def _pareto(parts: Sequence[_Front], most_seconds: float, most_memory: float) -> _Front:
    """The partial plans that can still win, by rising bytes and falling seconds."""
    if not parts:
        return _Front(np.empty(0), np.empty(0), np.empty((0, 3), np.int64))
    seconds = np.concatenate([part.seconds for part in parts])
    memory = np.concatenate([part.memory for part in parts])
    previous = np.concatenate([part.previous for part in parts])
    slack = 1 + _ROUNDING
    alive = (seconds <= most_seconds * slack) & (memory <= most_memory * slack)
    seconds, memory, previous = seconds[alive], memory[alive], previous[alive]
    order = np.lexsort((seconds, memory))
    seconds, memory, previous = seconds[order], memory[order], previous[order]
    before = np.minimum.accumulate(np.concatenate([[np.inf], seconds]))[:-1]
    front = seconds < before * (1 - 1e-12)
    return _Front(seconds[front], memory[front], previous[front])


def _trace(fronts: Sequence[Sequence[_Front]]) -> Best | None:
    ends = [
        (float(front.seconds[-1]), float(front.memory[-1]), state, len(front.seconds) - 1)
        for state, front in enumerate(fronts[-1])
        if len(front.seconds)
    ]
    if not ends:
        return None
    seconds, memory, state, entry = min(ends)
    indices = []
    for row in reversed(fronts):
        before, at, index = (int(n) for n in row[state].previous[entry])
        indices.append(index)
        state, entry = before, at
    return Best(tuple(reversed(indices)), seconds, memory)
