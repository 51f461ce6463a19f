"""Sizes at which a condition is false, where a graph that was made where it holds may be wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import sympy

from moec.ir.sizes.dims import Bounds
from moec.ir.sizes.thresholds import Truth, allows, far_sizes, sizes_around, truth_of

MOST_ROWS = 1 << 15
"""The greatest product of sizes at which module and graph are run."""
_TRIED = 3
_MOST = 8
_MANY = 1031
_FURTHER = 8
"""How many times as many rows as the least sizes have, the further sizes may have."""


def false_at(
    condition: sympy.Basic, bounds: Mapping[str, Bounds], example: Mapping[str, int]
) -> list[Mapping[str, int]]:
    """Assignments of sizes, none of them 0, for which a condition is false. For each combination of
    its relations that is false, such as below the least of two sizes and beyond the other: the
    smallest few, at which both sides of a branch may agree since they meet there, and larger ones
    at the edge and away from it. Where a combination needs more rows than can be run, they are the
    least such sizes."""
    truth = truth_of(condition)
    products = {name: limits for name, limits in bounds.items() if not name.isidentifier()}
    least = {name: replace(limits, low=max(limits.low, 1)) for name, limits in bounds.items()}
    near = _regions(truth, products, sizes_around([truth], least, example))
    tried = [_some_of(region, truth) for region in near.values()]
    if len(truth.names) > 1:  # a product may pass a number only where one size is large
        far = _regions(truth, products, far_sizes(truth, least, example))
        others = [region for held, region in far.items() if held not in near]
        tried += [sorted(region, key=_product) for region in others]
    return [s for region in tried for s in ([*filter(can_run, region)][:_MOST] or region[:1])]


def with_many_rows(
    condition: sympy.Basic, bounds: Mapping[str, Bounds], false: Sequence[Mapping[str, int]]
) -> list[Mapping[str, int]]:
    """The first and the last of these sizes with each size in turn large, where the condition is
    false still: a capacity of hundreds of rows makes no difference at fewer."""
    truth = truth_of(condition)
    many = [{**sizes, name: _MANY} for sizes in (*false[:1], *false[-1:]) for name in sizes]
    return [sizes for sizes in many if not truth.holds(sizes) and allows(bounds, sizes)]


def _regions(
    truth: Truth, products: Mapping[str, Bounds], tried: Iterable[Mapping[str, int]]
) -> dict[tuple[bool, ...], list[Mapping[str, int]]]:
    """The sizes of `tried` within bounds at which a condition is false, by the relations of it that
    hold there."""
    relations = truth.expression.atoms(sympy.core.relational.Relational)
    parts = [truth_of(relation) for relation in relations]
    regions: dict[tuple[bool, ...], list[Mapping[str, int]]] = {}
    for sizes in tried:
        if not truth.holds(sizes) and allows(products, sizes):
            regions.setdefault(tuple(part.holds(sizes) for part in parts), []).append(sizes)
    return regions


def _product(sizes: Mapping[str, int]) -> int:
    return math.prod(sizes.values())


def can_run(sizes: Mapping[str, int]) -> bool:
    """Whether these sizes are few enough rows to run module and graph."""
    return _product(sizes) <= MOST_ROWS


def _some_of(region: Sequence[Mapping[str, int]], truth: Truth) -> list[Mapping[str, int]]:
    """The first few of a region's sizes, larger ones, and the largest beside sizes at which the
    condition is true: 100 rows of `64 if rows > 100 else rows`, which is 64 at 64 rows too."""

    def rows(sizes: Mapping[str, int]) -> int:
        return math.prod(sizes[name] for name in truth.names)

    def is_edge(sizes: Mapping[str, int]) -> bool:
        return any(truth.holds({**sizes, n: sizes[n] + d}) for n in truth.names for d in (-1, 1))

    most = max(_FURTHER * rows(region[0]), 64)
    near = [sizes for sizes in region[_TRIED:] if rows(sizes) <= most]
    further = sorted(near, key=lambda s: (min(s[n] for n in truth.names), rows(s)))
    edge = list(filter(is_edge, region))
    edge = [sizes for sizes in edge if rows(sizes) <= max(4 * rows(edge[0]), 64)]
    last = sorted(edge, key=rows)[-1:]
    tried = [*region[:_TRIED], *further[-1:], *near[len(near) // 2 :][:1], *last]
    return list({tuple(sizes.items()): sizes for sizes in tried}.values())
