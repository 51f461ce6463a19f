"""A captured program, and how it relates to its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from moec.interpret.outputs import Structure
from moec.ir.graph import Program
from moec.oracle.cases import Eager

WayName = Literal["traced", "speculated", "masked"]
"""How a module was captured: "traced" by torch.export alone; "speculated", with branches on data
answered and proved; or "masked", with every row computed for every expert."""


@dataclass(frozen=True)
class Captured:
    """A captured program, and how it relates to its source.

    `eager(*tensors)` runs the source on the graph's inputs, without states, and returns the graph's
    outputs; `structure` rebuilds the source's result from them. `fixed` are notes about axes that
    cannot vary and about guards of the export. `is_graph` is True where the source is already a
    graph. `described` names the modules that were replaced by a description of their behaviour, and
    `notes` has the notes about them. `other` captures the same source in another form, for use
    where this one cannot be compiled. `way` is how the module was captured.
    """

    program: Program
    eager: Eager
    example: tuple[torch.Tensor, ...]
    structure: Structure
    fixed: tuple[str, ...] = ()
    is_graph: bool = False
    notes: tuple[str, ...] = ()
    described: tuple[str, ...] = ()
    other: Callable[[], Captured] | None = None
    way: WayName = "traced"
