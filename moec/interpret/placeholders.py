"""Random inputs for models that count placeholders in a text.

A text with images has a run of equal ids for each image, as long as the image has features, and the
model refuses any other number. Where random ids are refused, runs keep their places and only the
other ids are random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from moec.interpret.random_inputs import Inputs, random_like, table_rows
from moec.ir.graph import Program

Result = TypeVar("Result")


def drawn_and_run(
    program: Program,
    example: Inputs,
    run: Callable[..., Result],
    generator: torch.Generator,
) -> tuple[tuple[torch.Tensor, ...], Result]:
    """Random inputs of the example's sizes, and the result of `run` for them; with the runs of the
    example where it refuses others. Raises what `run` raises for the first of them."""
    random = tuple(random_like(program, example, generator)[: len(example)])
    try:
        return random, run(*random)
    except Exception as refused:
        inputs = with_runs(program, example, random)
        if all(a is b for a, b in zip(inputs, random, strict=True)):
            raise
        try:
            return inputs, run(*inputs)
        except Exception:
            raise refused from None


def with_runs(
    program: Program, example: Inputs, random: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """`random`, with the runs of equal ids in `example`, and without their ids elsewhere; a tensor
    without runs, or of nothing else, is that of `random`."""
    inputs = []
    pairs = zip(program.graph.inputs, example, random, strict=False)
    for value, tensor, other in pairs:
        runs = _runs(tensor) if tensor.ndim and table_rows(program.graph, value) else None
        if runs is None or not runs.any() or runs.all():
            inputs.append(other)
            continue
        plain = tensor[~runs]
        free = torch.isin(other, tensor[runs], invert=True)
        inputs.append(torch.where(runs, tensor, torch.where(free, other, plain[0])))
    return tuple(inputs)


def _runs(ids: torch.Tensor) -> torch.Tensor:
    """Which ids equal a neighbour in the last axis."""
    equal = torch.zeros(ids.shape, dtype=torch.bool)
    same = ids[..., 1:] == ids[..., :-1]
    equal[..., 1:] |= same
    equal[..., :-1] |= same
    return equal
