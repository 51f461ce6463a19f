"""The best plan with equal degrees in all layers, as a search over a grid finds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from moec.errors import UsageError
from moec.plan.network.degrees import Degrees
from moec.plan.plan import Plan
from moec.plan.search.planner import LEVEL, Planner


def best_uniform(planner: Planner) -> Plan:
    """The best plan with equal degrees, form and share of slots for copies in all layers with
    experts. Raises UsageError where none fits."""
    least = [_least_seconds(planner, index) for index in range(len(planner.cost.layers))]
    routed = [row for row, layer in zip(least, planner.cost.layers, strict=True) if layer.experts]
    keys = (routed or least)[0]
    totals = [(_total(least, key), key) for key in keys]
    slots = [planner.slots_of(index) for index in range(len(least))]
    best: tuple[float, Sequence[Degrees]] | None = None
    for bound, key in sorted((total, key) for total, key in totals if total is not None):
        if best is not None and bound > best[0] * LEVEL:
            break
        for grid in _grids(slots, key):
            costs = [planner.layer_cost(index, degrees) for index, degrees in enumerate(grid)]
            seconds = sum(cost.seconds for cost in costs)
            fits = sum(cost.memory for cost in costs) <= planner.cost.memory_limit
            if fits and (best is None or seconds < best[0]):
                best = seconds, grid
    if best is None:
        raise UsageError(planner.too_large())
    return planner.plan(best[1], best[0])


def _least_seconds(planner: Planner, index: int) -> dict[Degrees, float]:
    """The least seconds of a layer with any number of slots, by its degrees without them. Those
    that balanced ranks do not need are left out, which costs at most a factor of `LEVEL`."""
    least: dict[Degrees, float] = {}
    for candidate in planner.candidates_of(index):
        key = replace(candidate.degrees, slots=0)
        least[key] = min(least.get(key, float("inf")), candidate.cost.seconds)
    return least


def _total(least: Sequence[Mapping[Degrees, float]], key: Degrees) -> float | None:
    """The sum over the layers; None where one of them cannot have these degrees."""
    dense = Degrees(key.attention)
    rows = [row.get(key, row.get(dense)) for row in least]
    return None if None in rows else sum(row for row in rows if row is not None)


def _grids(
    slots: Sequence[Mapping[Degrees, Sequence[int]]], key: Degrees
) -> Iterator[tuple[Degrees, ...]]:
    """The degrees of all layers, by the share of slots for copies."""
    dense = Degrees(key.attention)
    rows = [(key, row[key]) if key in row else (dense, row[dense]) for row in slots]
    for share in range(max(len(numbers) for _, numbers in rows)):
        yield tuple(
            replace(degrees, slots=numbers[min(share, len(numbers) - 1)])
            for degrees, numbers in rows
        )
