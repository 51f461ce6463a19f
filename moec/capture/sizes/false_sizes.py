"""Sizes at which a condition is false, where a graph that was made where it holds may be wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
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
    around = (s for s in sizes_around([truth], least, example) if allows(products, s))
    near, true = _regions(truth, around)
    tried = [_some_of(region, truth.names, true) for region in near.values()]
    if len(truth.names) > 1:  # a product may pass a number only where one size is large
        beyond = (s for s in far_sizes(truth, least, example) if allows(products, s))
        far, _ = _regions(truth, beyond)
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
    truth: Truth, tried: Iterable[Mapping[str, int]]
) -> tuple[dict[tuple[bool, ...], list[Mapping[str, int]]], set[tuple[int, ...]]]:
    """The sizes of `tried` at which a condition is false, by the relations of it that hold there,
    and the keys of those at which it is true."""
    relations = [
        truth_of(part) for part in truth.expression.atoms(sympy.core.relational.Relational)
    ]
    true: set[tuple[int, ...]] = set()
    regions: dict[tuple[bool, ...], list[Mapping[str, int]]] = {}
    for sizes in tried:
        if truth.holds(sizes):
            true.add(_key(sizes, truth.names))
        else:
            held = tuple(relation.holds(sizes) for relation in relations)
            regions.setdefault(held, []).append(sizes)
    return regions, true


def _product(sizes: Mapping[str, int]) -> int:
    return math.prod(sizes.values())


def can_run(sizes: Mapping[str, int]) -> bool:
    """Whether these sizes are few enough rows to run module and graph."""
    return _product(sizes) <= MOST_ROWS


def _some_of(
    region: Sequence[Mapping[str, int]], names: Set[str], true: Set[tuple[int, ...]]
) -> list[Mapping[str, int]]:
    """The first few of a region's sizes, larger ones, and the largest beside one of `true`: 100
    rows of `64 if rows > 100 else rows`, which is 64 at 64 rows too."""
    most = max(_FURTHER * _rows(region[0], names), 64)
    near = [sizes for sizes in region[_TRIED:] if _rows(sizes, names) <= most]
    further = sorted(near, key=lambda s: (min(s[n] for n in names), _rows(s, names)))
    edge = [sizes for sizes in region if not true.isdisjoint(_neighbours(_key(sizes, names)))]
    edge = [sizes for sizes in edge if _rows(sizes, names) <= max(4 * _rows(edge[0], names), 64)]
    last = sorted(edge, key=lambda sizes: _rows(sizes, names))[-1:]
    tried = [*region[:_TRIED], *further[-1:], *near[len(near) // 2 :][:1], *last]
    return list({_key(sizes, names): sizes for sizes in tried}.values())


def _key(sizes: Mapping[str, int], names: Set[str]) -> tuple[int, ...]:
    return tuple(size for name, size in sorted(sizes.items()) if name in names)


def _neighbours(key: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The sizes that differ by 1 in one of them."""
    for axis, size in enumerate(key):
        for other in (size - 1, size + 1):
            yield (*key[:axis], other, *key[axis + 1 :])


def _rows(sizes: Mapping[str, int], names: Set[str]) -> int:
    return math.prod(sizes[name] for name in names)
