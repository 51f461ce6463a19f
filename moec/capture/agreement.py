"""Whether a captured graph computes what its module does, at sizes that were not exported."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch

from moec.capture.widening import Axis, Widened
from moec.errors import IRError
from moec.interpret.evaluate import evaluate
from moec.interpret.random_inputs import random_like
from moec.interpret.tolerance import default_tolerance, distance
from moec.ir.dims import Bounds
from moec.ir.graph import Program

Eager: TypeAlias = Callable[..., tuple[torch.Tensor, ...]]


def agree(program: Program, eager: Eager, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the graph computes what the module does, up to rounding."""
    limit = default_tolerance(program.graph)
    states = [program.weights[state.before.name] for state in program.graph.states]
    ours = evaluate(program.graph, [*tensors, *states], program.weights)
    theirs = eager(*tensors)
    return all(distance(a, b) <= limit for a, b in zip(ours, theirs, strict=False))


def agree_at(program: Program, eager: Eager, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether graph and module run at the sizes of `tensors`, and agree on one draw of them.

    In 16 bits a near tie may send the few tokens of one draw to other experts, which says
    nothing about the size.
    """
    try:
        return any(agree(program, eager, draw) for draw in _draws(program, tensors))
    except (RuntimeError, IRError, IndexError, ValueError):
        return False


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
    program: Program, asked: Collection[str], eager: Eager, tensors: Sequence[torch.Tensor]
) -> Program:
    """The program with lower bounds of 2 made 1 where it agrees with the module at size 1.

    Such a bound comes from torch.export, which treats 1 apart, or from a branch of the module's
    own (`if length > 1`). The bounds in `asked` stand. A size is tried at 1 alone, and together
    with those that may be 1 already.
    """
    graph = program.graph
    bounds = dict(graph.bounds)
    lowered: set[str] = set()
    for name, limits in graph.bounds.items():
        if limits.low != 2 or name in asked:
            continue
        tries = [{name}, lowered | {name}] if lowered else [{name}]
        if all(agree_at(program, eager, _at_one(program, tensors, names)) for names in tries):
            bounds[name] = Bounds(1, limits.high)
            lowered.add(name)
    return Program(replace(graph, bounds=bounds), program.weights)


def _at_one(
    program: Program, tensors: Sequence[torch.Tensor], names: Collection[str]
) -> list[torch.Tensor]:
    return [
        cut(tensor, [axis for axis, dim in enumerate(value.shape) if str(dim) in names])
        for value, tensor in zip(program.graph.inputs, tensors, strict=False)
    ]


def wrong_at_one(
    program: Program, eager: Eager, example: Sequence[torch.Tensor], widened: Widened
) -> tuple[Axis, ...]:
    """Axes of length 1 in the example at which the graph of the widened one does not hold.

    None where graph and module agree on the example. Else those of each group that is wrong
    with its own length at 1 alone, or all.
    """
    if not widened.single or agree_at(program, eager, example):
        return ()
    wrong = [
        group
        for group in widened.single
        if not agree_at(
            program,
            eager,
            [
                cut(tensor, [axis.axis for axis in group.axes if axis.tensor == place])
                for place, tensor in enumerate(widened.tensors)
            ],
        )
    ]
    return tuple(
        axis
        for group in wrong or widened.single
        for axis in group.axes
        if example[axis.tensor].shape[axis.axis] == 1
    )
