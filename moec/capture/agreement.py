"""Whether a captured graph computes what its module does, at sizes that were not exported."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from moec.capture.lengths import AxisGroup, resized
from moec.capture.widening import Widened
from moec.errors import IRError
from moec.interpret.evaluate import evaluate
from moec.interpret.outputs import VaryingOutput
from moec.interpret.random_inputs import random_like
from moec.interpret.tolerance import default_tolerance, distance
from moec.ir.dims import Bounds
from moec.ir.graph import Program

Eager: TypeAlias = Callable[..., tuple[torch.Tensor, ...]]


def agree(program: Program, eager: Eager, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the graph computes what the module does, up to rounding."""
    return _equals(program, tensors, eager(*tensors))


def _equals(
    program: Program, tensors: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]
) -> bool:
    limit = default_tolerance(program.graph)
    states = [program.weights[state.before.name] for state in program.graph.states]
    ours = evaluate(program.graph, [*tensors, *states], program.weights)
    return all(distance(a, b) <= limit for a, b in zip(ours, theirs, strict=False))


def matches(
    program: Program, tensors: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]
) -> bool:
    """Whether the graph gives `expected` up to rounding; not where it cannot be evaluated."""
    try:
        return _equals(program, tensors, expected)
    except (RuntimeError, IRError, IndexError, ValueError):
        return False


def agree_at(program: Program, eager: Eager, tensors: Sequence[torch.Tensor]) -> bool | None:
    """Whether graph and module agree at the sizes of `tensors`, on one draw of them at least;
    None where the module does not run.

    In 16 bits a near tie may send the few tokens of one draw to other experts, which says
    nothing about the size.
    """
    runs = False
    for draw in _draws(program, tensors):
        try:
            results = eager(*draw)
        except VaryingOutput:
            raise
        except Exception:  # whatever the module raises, it refuses these sizes
            continue
        runs = True
        try:
            if _equals(program, draw, results):
                return True
        except (RuntimeError, IRError, IndexError, ValueError):
            return False
    return False if runs else None


def _draws(program: Program, tensors: Sequence[torch.Tensor]) -> Iterator[Sequence[torch.Tensor]]:
    yield tensors
    yield [tensor.flip(tuple(range(tensor.ndim))) for tensor in tensors]
    yield random_like(program, tensors, torch.Generator().manual_seed(0))[: len(tensors)]


def cut(tensor: torch.Tensor, axes: Sequence[int], index: int = 0) -> torch.Tensor:
    """`tensor` with the element at `index` alone of each of `axes`."""
    for axis in axes:
        if tensor.shape[axis]:
            tensor = tensor.narrow(axis, index % tensor.shape[axis], 1)
    return tensor


def allow_one(
    program: Program,
    fixed_bounds: Collection[str],
    eager: Eager,
    examples: Sequence[Sequence[torch.Tensor]],
) -> Program:
    """The program with lower bounds of 1 where it agrees with the module at size 1, else of 2.

    A bound of 2 comes from torch.export, which treats 1 apart, or from a branch of the module's
    own (`if length > 1`); a branch may as well leave none. Sizes in `fixed_bounds` keep their
    bounds, and so does a size at which the module does not run with 1. A size is tried at 1 alone,
    and together with the sizes lowered before it, in the first of `examples` that the module runs.
    """
    graph = program.graph
    bounds = dict(graph.bounds)
    lowered: set[str] = set()

    def agrees(names: Collection[str]) -> bool | None:
        answers = (agree_at(program, eager, _at_one(program, t, names)) for t in examples)
        return next((answer for answer in answers if answer is not None), None)

    for name, limits in graph.bounds.items():
        if limits.low > 2 or name in fixed_bounds:
            continue
        answers = [agrees(names) for names in ({name}, lowered | {name})[: 1 + bool(lowered)]]
        if all(answers):
            bounds[name] = Bounds(min(limits.low, 1), limits.high)
            lowered.add(name)
        elif False in answers:
            bounds[name] = Bounds(2, limits.high)
    return Program(replace(graph, bounds=bounds), program.weights)


def _at_one(
    program: Program, tensors: Sequence[torch.Tensor], names: Collection[str]
) -> list[torch.Tensor]:
    return [
        cut(tensor, [axis for axis, dim in enumerate(value.shape) if str(dim) in names])
        for value, tensor in zip(program.graph.inputs, tensors, strict=False)
    ]


def refuted(
    program: Program, eager: Eager, example: Sequence[torch.Tensor], widened: Widened
) -> tuple[AxisGroup, ...]:
    """Groups that have another length in the example, at which the graph does not hold.

    None where graph and module agree on the example. Else those that are wrong with their own
    group alone at the example's length, or all.
    """
    if not widened.moved or agree_at(program, eager, example):
        return ()
    wrong = []
    for group in widened.moved:
        first = group.axes[0]
        back = replace(group, length=example[first.tensor].shape[first.axis])
        if agree_at(program, eager, resized(widened.tensors, [back])) is False:
            wrong.append(group)
    return tuple(wrong) or widened.moved
