"""Settles the guards of a captured program by comparing it with its module at other sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from moec.capture.guards.guards import Guard
from moec.capture.guards.settle import Settled, settle
from moec.capture.proof.agreement import Eager, matches
from moec.interpret.placeholders import drawn_and_run
from moec.interpret.resized import with_sizes
from moec.interpret.tolerance import STRAYS, computed_dtypes
from moec.ir.graph import Program
from moec.ir.sizes.dims import bind_shape


def settled(
    name: str,
    program: Program,
    guards: Sequence[Guard],
    eager: Eager,
    example: Sequence[torch.Tensor],
) -> Settled:
    """The bounds of the sizes under the program's guards, and notes about them.

    Raises GuardRefused for a guard at whose violation graph and module differ.
    """

    def agree(other: Mapping[str, int]) -> bool | None:
        return agree_at_sizes(program, eager, example, other)

    return settle(name, program.graph, guards, sizes_of(program, example), agree)


def bounded(program: Program, settlement: Settled) -> Program:
    """The program with the bounds that its guards set."""
    return replace(program, graph=replace(program.graph, bounds=settlement.bounds))


def required(
    name: str, program: Program, guards: Sequence[Guard], example: Sequence[torch.Tensor]
) -> tuple[Program, tuple[str, ...]]:
    """As `settled`, for an exported program, which is valid only where its guards hold."""
    result = settle(name, program.graph, guards, sizes_of(program, example), None)
    return bounded(program, result), result.notes


def sizes_of(program: Program, example: Sequence[torch.Tensor]) -> dict[str, int]:
    """The named sizes of the example."""
    sizes: dict[str, int] = {}
    for value, tensor in zip(program.graph.inputs, example, strict=False):
        bind_shape(value.shape, tuple(tensor.shape), sizes)
    return sizes


def agree_at_sizes(
    program: Program, eager: Eager, example: Sequence[torch.Tensor], sizes: Mapping[str, int]
) -> bool | None:
    """Whether graph and module agree at `sizes`: on the example, on random inputs, and on inputs
    whose rows are all alike, of which one expert may get more than its capacity.

    Where the graph computes in 16 bits, agreement on one of two inputs is enough, of different rows
    and of rows that are alike, because a near tie may route to other experts in the other. Returns
    None where the module fails.
    """
    pairs = zip(example, program.graph.inputs, strict=False)
    resized_example = [with_sizes(tensor, value.shape, sizes) for tensor, value in pairs]
    generator = torch.Generator().manual_seed(0)
    either = any(dtype in STRAYS for dtype in computed_dtypes(program.graph))
    try:
        random, results = drawn_and_run(program, resized_example, eager, generator)
        draws = [(resized_example, eager(*resized_example)), (list(random), results)]
    except Exception:  # whatever the user's code raises
        return None
    equal = []
    for source in (random, resized_example)[: 1 + either]:
        alike = [_equal_rows(tensor) for tensor in source]
        with suppress(Exception):  # a text of one token only has too many tokens of images
            equal.append((alike, eager(*alike)))
    sufficient = any if either else all
    return all(
        sufficient(matches(program, draw, expected) for draw, expected in kind)
        for kind in (draws, equal)
        if kind
    )


def _equal_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its first row in the place of every row."""
    features = tensor.shape[-1] if tensor.is_floating_point() and tensor.ndim else 1
    rows = tensor.reshape(-1, features)
    return rows[:1].expand_as(rows).reshape(tensor.shape).clone()
