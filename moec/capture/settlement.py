"""Settles the guards of a captured program by comparing it with its module at other sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from moec.capture.agreement import Eager, matches
from moec.capture.guards import Guard, settle
from moec.interpret.random_inputs import random_like
from moec.interpret.resized import with_sizes
from moec.interpret.tolerance import STRAYS, computed_dtypes
from moec.ir.dims import bind_shape
from moec.ir.graph import Program


def settled(
    name: str,
    program: Program,
    guards: Sequence[Guard],
    eager: Eager,
    example: Sequence[torch.Tensor],
) -> tuple[Program, tuple[str, ...]]:
    """The program with the bounds that its guards set, and notes about them.

    Raises CaptureError for a guard at whose violation graph and module differ.
    """

    def agree(other: Mapping[str, int]) -> bool | None:
        return _agree_at_sizes(program, eager, example, other)

    result = settle(name, program.graph, guards, _sizes(program, example), agree)
    return replace(program, graph=replace(program.graph, bounds=result.bounds)), result.notes


def required(
    name: str, program: Program, guards: Sequence[Guard], example: Sequence[torch.Tensor]
) -> tuple[Program, tuple[str, ...]]:
    """As `settled`, for an exported program, which is valid only where its guards hold."""
    result = settle(name, program.graph, guards, _sizes(program, example), None)
    return replace(program, graph=replace(program.graph, bounds=result.bounds)), result.notes


def _sizes(program: Program, example: Sequence[torch.Tensor]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for value, tensor in zip(program.graph.inputs, example, strict=False):
        bind_shape(value.shape, tuple(tensor.shape), sizes)
    return sizes


def _agree_at_sizes(
    program: Program, eager: Eager, example: Sequence[torch.Tensor], sizes: Mapping[str, int]
) -> bool | None:
    """Whether graph and module agree on the example and on random inputs, both at `sizes`.

    Where the graph computes in 16 bits, agreement on one of the two is enough, because a near tie
    may route to other experts in the other. Returns None where the module fails.
    """
    pairs = zip(example, program.graph.inputs, strict=False)
    resized_example = [with_sizes(tensor, value.shape, sizes) for tensor, value in pairs]
    generator = torch.Generator().manual_seed(0)
    random = random_like(program, resized_example, generator)[: len(resized_example)]
    either = any(dtype in STRAYS for dtype in computed_dtypes(program.graph))
    try:
        draws = [(draw, eager(*draw)) for draw in (resized_example, random)]
    except Exception:  # whatever the user's code raises
        return None
    answers = [matches(program, draw, expected) for draw, expected in draws]
    return any(answers) if either else all(answers)
