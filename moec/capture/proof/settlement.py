"""Settles the guards of a captured program by comparing it with its module at other sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from moec.capture.guards.guards import Guard
from moec.capture.guards.settle import Settled, settle
from moec.ir.graph import Program
from moec.oracle.agree import agree_at_sizes, sizes_of
from moec.oracle.cases import Eager


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
