"""The sizes, besides the example's, at which a graph should be compared with eager."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from moec.ir.graph import Graph, Value
from moec.ir.replace_sizes import size_expressions
from moec.ir.sizes.dims import Bounds, bind_shape, parse_dim, symbols
from moec.ir.sizes.thresholds import allows, nearest_allowed, sizes_at_changes

_CASES = 12
"""At most this many cases, the smallest ones, so that a verification takes seconds."""
_ELEMENTS = 1 << 12
"""The product of all sizes may be this large, or four times the example's."""
_KEEPS = (
    *(f"aten.{name}.default" for name in ("unsqueeze", "reshape", "expand", "_to_copy", "permute")),
    *("aten.slice.Tensor", "aten.sub.Tensor", "aten.add.Tensor"),
)
_COMPARISONS = tuple(f"aten.{name}.Scalar" for name in ("lt", "le", "gt", "ge", "eq", "ne"))


def turns(graph: Graph, example: Sequence[torch.Tensor]) -> list[dict[str, int]]:
    """Sizes on both sides of each threshold of a size expression, of a mask over positions, and of
    the bounds; only a few small ones."""
    sizes: dict[str, int] = {}
    for value, tensor in zip(graph.inputs, example, strict=False):
        bind_shape(value.shape, tuple(tensor.shape), sizes)
    bounds = {name: limits for name, limits in graph.bounds.items() if name in sizes}
    expressions = dict.fromkeys(e for op in graph.ops for e in size_expressions(op))
    moved = sizes_at_changes(expressions, bounds, sizes)
    moved += [{**sizes, name: size} for name, size in _masks(graph, bounds)]
    moved += [{**sizes, name: size} for name, size in _ends(bounds)]
    moved += [{**sizes, name: sizes[name] + 1} for name in _in_expressions(graph) & bounds.keys()]
    moved = [nearest_allowed(graph.bounds, m, way) for m in moved for way in (1, -1)]
    most = max(_ELEMENTS, 4 * math.prod(sizes.values()))
    moved = [m for m in moved if math.prod(m.values()) <= most and allows(graph.bounds, m)]
    small = {tuple(sorted(m.items())): m for m in moved}
    small.pop(tuple(sorted(sizes.items())), None)
    return sorted(small.values(), key=lambda m: math.prod(m.values()))[:_CASES]


def _masks(graph: Graph, bounds: Mapping[str, Bounds]) -> Iterator[tuple[str, int]]:
    """Sizes around integers with which positions are compared."""
    for op in graph.ops:
        number = op.attrs.get("other")
        if op.name not in _COMPARISONS or not isinstance(number, int):
            continue
        if _is_position(graph, op.inputs[0]):
            names = {n for dim in op.inputs[0].shape for n in symbols(dim)} & bounds.keys()
            for name in sorted(names):
                for size in (number, number + 1, number + 2):
                    if size >= 1 and bounds[name].contains(size):
                        yield name, size


def _is_position(graph: Graph, value: Value) -> bool:
    """Whether a value is a position along an axis: computed from aten.arange, without data."""
    op = graph.producers.get(value)
    if op is None or value.dtype != "i64":
        return False
    if op.name.startswith("aten.arange."):
        return True
    return op.name in _KEEPS and any(_is_position(graph, source) for source in op.inputs)


def _in_expressions(graph: Graph) -> set[str]:
    """The sizes that are bounded together: a product of them, or a remainder."""
    expressions = (parse_dim(name) for name in graph.bounds if not name.isidentifier())
    return {name for expression in expressions for name in symbols(expression)}


def _ends(bounds: Mapping[str, Bounds]) -> Iterator[tuple[str, int]]:
    for name, limits in bounds.items():
        first = (limits.low, limits.low + 1) if limits.low > 1 else ()
        for size in (*first, limits.high):
            if size is not None and limits.contains(size):
                yield name, size
