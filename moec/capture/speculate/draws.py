"""Inputs on which a capture is proved: sizes on both sides of each number that a condition compares
with, and routings in which an expert gets all rows, none, or some."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sympy
import torch

from moec.ir.graph import Graph, Program
from moec.ir.sizes.dims import Bounds
from moec.ir.sizes.thresholds import nearest_allowed
from moec.oracle.agree import at_sizes
from moec.oracle.cases import Case, Result, Run, drawn_and_run
from moec.oracle.draws import DRAWS

MOST_ROWS = 4096
"""The most rows that a proof draws. A branch that needs more rows to go both ways is refused."""

_SHAPES: tuple[tuple[int, ...], ...] = ((1, 1), (3, 29), (1, 7), (5, 1), (4, 40), (2, 2))


def draws(
    program: Program, example: Sequence[torch.Tensor], conditions: Iterable[Any], run: Run[Result]
) -> Iterator[tuple[Case, Result]]:
    """Draws of every kind at several sizes, and the results of `run` for them."""
    for sizes in _assignments(program.graph, example, conditions):
        resized = at_sizes(program, example, sizes)
        if any(math.prod(tensor.shape[:-1]) > 2 * MOST_ROWS for tensor in resized):
            continue
        for draw in DRAWS:
            accepted = drawn_and_run(program, resized, run, draw)
            if accepted is not None:
                yield accepted


def not_finite(example: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The example with a row of NaN and with an infinite row, for branches on `isfinite`."""
    for number in (float("nan"), float("inf")):
        case = [tensor.clone() for tensor in example]
        for tensor in case:
            if tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel():
                tensor.view(-1, tensor.shape[-1])[-1] = number
        yield case


def other_integers(case: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The case with negative and large numbers added to the integers of an input, to one of them
    or to all: where all are one number, a side of a branch may take others too."""
    generator = torch.Generator().manual_seed(11)
    for number, values in enumerate(numbers_in(case)):
        for limit in (1, 8, 1000) if len(values) == 1 else ():
            for low, high in ((-limit, 0), (0, limit), (-limit, limit)):
                step = torch.randint(low, high + 1, case[number].shape, generator=generator)
                one = torch.zeros_like(step)
                one.view(-1)[0] = low or high
                for change in (step, one):
                    changed = (case[number] + change).to(case[number].dtype)
                    yield [*case[:number], changed, *case[number + 1 :]]


def numbers_in(case: Sequence[torch.Tensor]) -> list[set[int]]:
    """The numbers in each input of integers; none for another input."""
    other = [t.is_floating_point() or t.is_complex() or t.dtype == torch.bool for t in case]
    pairs = zip(case, other, strict=True)
    return [set() if skipped else set(t.flatten().tolist()) for t, skipped in pairs]


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
