"""Inputs on which a capture is proved: sizes on both sides of each number that a condition compares
with, and routings in which an expert gets all rows, none, or some."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch

from moec.dtypes import FLOATS
from moec.ir.graph import Graph, Value
from moec.ir.sizes.dims import Bounds, symbols
from moec.ir.sizes.thresholds import nearest_allowed

MOST_ROWS = 4096
"""The most rows that a proof draws. A branch that needs more rows to go both ways is refused."""

_BEYOND = 2
"""How far drawn integers exceed the greatest integer of the example."""

_SHAPES: tuple[tuple[int, ...], ...] = ((1, 1), (3, 29), (1, 7), (5, 1), (4, 40), (2, 2))
Case = list[torch.Tensor]


def draws(
    graph: Graph, examples: Sequence[Sequence[torch.Tensor]], conditions: Iterable[Any]
) -> Iterator[Case]:
    """The examples, then inputs of several sizes and kinds: random; all rows equal, so that one
    expert gets all rows; zeros, so that scores tie; two kinds of rows; large values. Integer inputs
    also get values beyond those of the examples, which eager may refuse."""
    yield from map(list, examples)
    example = examples[0]
    integers = any(not t.is_floating_point() and t.dtype != torch.bool for t in example)
    kinds = ("random", "alike", "zero", "two", "large", *["beyond"] * integers)
    generator = torch.Generator().manual_seed(0)
    for sizes in _assignments(graph, example, conditions):
        for kind in kinds:
            pairs = zip(graph.inputs, example, strict=False)
            yield [_draw(value, tensor, sizes, kind, generator) for value, tensor in pairs]


def not_finite(example: Sequence[torch.Tensor]) -> Iterator[Case]:
    """The example with a row of NaN and with an infinite row, for branches on `isfinite`."""
    for number in (float("nan"), float("inf")):
        case = [tensor.clone() for tensor in example]
        for tensor in case:
            if tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel():
                tensor.view(-1, tensor.shape[-1])[-1] = number
        yield case


def _assignments(
    graph: Graph, example: Sequence[torch.Tensor], conditions: Iterable[Any]
) -> list[dict[str, int]]:
    """Sizes by name: those of the example, small and odd ones, and one more than each number that a
    condition compares with."""
    names = [name for name in graph.bounds if name.isidentifier()]
    if not names:
        return [{}]
    shapes = [_of_example(graph, example)]
    for shape in _SHAPES:
        values = itertools.chain(shape, itertools.repeat(shape[-1]))
        ordered = reversed(list(zip(reversed(names), reversed(shape), strict=False)))
        shapes.append({**dict(zip(names, values, strict=False)), **dict(ordered)})
    for number in sorted(_numbers(conditions)):
        if 1 <= number < MOST_ROWS:
            shapes.append(dict.fromkeys(names, 1) | {names[-1]: number + 1})
    clamped = (
        {name: _clamp(size, graph.bounds[name]) for name, size in shape.items()} for shape in shapes
    )
    distinct = {tuple(sorted(nearest_allowed(graph.bounds, shape).items())) for shape in clamped}
    return [dict(shape) for shape in sorted(distinct)]


def _of_example(graph: Graph, example: Sequence[torch.Tensor]) -> dict[str, int]:
    return {
        str(dim): size
        for value, tensor in zip(graph.inputs, example, strict=False)
        for dim, size in zip(value.shape, tensor.shape, strict=True)
        if isinstance(dim, sympy.Symbol)
    }


def _numbers(conditions: Iterable[Any]) -> set[int]:
    """The integers in conditions on data, with which counts are compared."""
    return {
        int(atom)
        for condition in conditions
        for atom in condition.atoms(sympy.Integer)
        if atom.is_Integer
    }


def _clamp(size: int, bounds: Bounds) -> int:
    size = max(size, bounds.low)
    return size if bounds.high is None else min(size, bounds.high)


def _draw(
    value: Value,
    tensor: torch.Tensor,
    sizes: Mapping[str, int],
    kind: str,
    generator: torch.Generator,
) -> torch.Tensor:
    shape = [
        int(dim.subs({s: sizes[s.name] for s in dim.free_symbols}))
        if not isinstance(dim, int) and symbols(dim) <= sizes.keys()
        else size
        for dim, size in zip(value.shape, tensor.shape, strict=True)
    ]
    floats = value.dtype in FLOATS
    if floats:
        drawn = torch.randn(shape, generator=generator).to(tensor.dtype)
    elif not tensor.numel() or tensor.dtype == torch.bool:
        return torch.zeros(shape, dtype=tensor.dtype) | (tensor.any() if tensor.numel() else False)
    else:
        low, high = int(tensor.min()), int(tensor.max()) + _BEYOND * (kind == "beyond")
        drawn = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int64)
        drawn = drawn.to(tensor.dtype)
    rows = drawn.reshape(-1, shape[-1]) if floats and len(shape) else drawn.reshape(-1, 1)
    if kind in ("alike", "two") and len(rows):
        rows = rows[torch.arange(len(rows)) % min(len(rows), 1 if kind == "alike" else 2)]
    if kind == "zero":
        rows = rows * 0 if floats else rows * 0 + (int(tensor.min()) if tensor.numel() else 0)
    return (rows * (9 if kind == "large" and floats else 1)).reshape(shape)
