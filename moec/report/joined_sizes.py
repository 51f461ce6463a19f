"""The sizes of a model that has several graphs, each for some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moec.ir.graph import Graph
from moec.ir.sizes.dims import Bounds, show_dim


def joined_bounds(main: Graph, others: Sequence[Graph]) -> Mapping[str, Bounds]:
    """The bounds of `main`, extended by those of the others that differ in one size, and go on
    where these end."""
    joined = dict(main.bounds)
    for other in (*others, *reversed(others)):  # in whatever order they touch
        bounds = joined | _bounds_by_axis(main, other)
        differing = [name for name in joined if bounds[name] != joined[name]]
        differing += [name for name in bounds.keys() - joined if not name.isidentifier()]
        if len(differing) == 1:
            (name,) = differing
            first, second = sorted((bounds[name], joined[name]), key=lambda limits: limits.low)
            if first.high is None or first.high + 1 >= second.low:
                highs = (first.high, second.high)
                high = None if None in highs else max(h for h in highs if h is not None)
                joined[name] = Bounds(first.low, high, joined[name].line)
    return joined


def _bounds_by_axis(main: Graph, other: Graph) -> dict[str, Bounds]:
    """The bounds of another graph, by the names that `main` has for the sizes of inputs."""
    bounds = {}
    for value, twin in zip(main.inputs, other.inputs, strict=True):
        for size, there in zip(value.shape, twin.shape, strict=True):
            exactly = Bounds(there, there) if isinstance(there, int) else Bounds()
            if not isinstance(size, int):
                bounds[show_dim(size)] = other.bounds.get(show_dim(there), exactly)
    return {**other.bounds, **bounds}
