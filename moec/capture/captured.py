"""A captured program, and how it relates to its source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from moec.errors import CaptureError, IRError
from moec.ir.graph import Program
from moec.ir.interpret.call_signature import CallSignature
from moec.ir.interpret.outputs import Structure
from moec.ir.sizes.dims import bind_shape
from moec.ir.sizes.thresholds import allows
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
    where this one cannot be compiled. `way` is how the module was captured. `beyond` are sizes
    that the program excludes because the module computes something else there. `signature` is how
    calls bind, None where they have the inputs of the graph.
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
    beyond: tuple[Beyond, ...] = ()
    signature: CallSignature | None = None


@dataclass(frozen=True)
class Beyond:
    """Inputs of these `shapes`, which a program excludes, and a function that captures the module
    at them. It raises CaptureError."""

    shapes: tuple[tuple[int, ...], ...]
    capture: Callable[[], Captured]


MOST_SIDES = 4
"""How many programs a module may have for other sizes than those of the first."""


def other_sides(first: Captured) -> tuple[tuple[Captured, ...], dict[str, str]]:
    """The module for the sizes that the bounds of `first` exclude, as far as it can be captured
    there; each side has the example of its sizes. And by shapes of inputs, why it cannot."""
    captures, refusals = [first], dict[str, str]()
    for captured in captures:  # which grows
        for sizes in captured.beyond:
            if any(_allows(each, sizes.shapes) for each in captures):
                continue
            if len(captures) > MOST_SIDES:
                refusals[shown(sizes.shapes)] = f"a model has at most {MOST_SIDES} other sides"
                continue
            try:
                captures.append(sizes.capture())
            except CaptureError as why:
                refusals[shown(sizes.shapes)] = str(why)
    return tuple(captures[1:]), refusals


def shown(shapes: Sequence[Sequence[int]]) -> str:
    return "inputs of " + ", ".join(str([*shape]) for shape in shapes)


def _allows(captured: Captured, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether the program takes inputs of these shapes. Its sizes may have other names."""
    graph, sizes = captured.program.graph, dict[str, int]()
    try:
        for value, shape in zip(graph.inputs, shapes, strict=True):
            bind_shape(value.shape, shape, sizes)
    except IRError:
        return False
    return allows(graph.bounds, sizes)
