"""The inputs with which a compiled model is compared with its module, and the module's results."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moec.capture import Captured
from moec.errors import CaptureError
from moec.interpret.placeholders import with_runs
from moec.interpret.random_inputs import random_like
from moec.interpret.resized import with_sizes
from moec.ir.sizes.dims import Bounds
from moec.ir.sizes.thresholds import nearest_allowed
from moec.verify.turns import turns

Case = tuple[torch.Tensor, ...]
Reference = tuple[Case, tuple[torch.Tensor, ...]]
"""Inputs, and the module's results for them."""


def cases(captured: Captured) -> list[Case]:
    """The example, and random inputs: of its sizes, of the least and of odd sizes, and of sizes on
    both sides of each threshold of a size expression, a mask or a guard."""
    program, generator = captured.program, torch.Generator().manual_seed(0)
    count = len(captured.example)
    inputs = [captured.example]
    few = (_sizes(captured, lambda b: max(b.low, 1)), _sizes(captured, _odd))
    for size in ({}, *few, *turns(captured.program.graph, captured.example)):
        example = [
            with_sizes(t, v.shape, size)
            for t, v in zip(captured.example, program.graph.inputs, strict=False)
        ]
        inputs.append(tuple(random_like(program, example, generator)[:count]))
    return inputs


def _odd(bounds: Bounds) -> int:
    """A size within the bounds, 19 if possible: no multiple of a tile."""
    high = bounds.high if bounds.high is not None else 19
    return max(bounds.low, min(high, 19 if bounds.low <= 19 else bounds.low))


def _sizes(captured: Captured, choose: Callable[[Bounds], int]) -> dict[str, int]:
    """A size for each name; B is at most 3, so that the cases stay small."""
    graph = captured.program.graph
    sizes = {
        name: choose(bounds) if name != "B" else min(choose(bounds), 3)
        for name, bounds in graph.bounds.items()
        if name.isidentifier()
    }
    return nearest_allowed(graph.bounds, sizes)


def references(captured: Captured) -> tuple[list[Reference], tuple[str, ...]]:
    """The module's results in each case, and a sentence for each case in which it fails.

    Raises CaptureError where it fails on its example.
    """
    results: list[Reference] = []
    skipped: list[str] = []
    for case in cases(captured):
        try:
            results.append(_run(captured, case))
        except Exception as error:
            if case is captured.example:
                raise CaptureError(f"the model fails on its example inputs: {error}") from error
            skipped.append(f"inputs {shapes(case)} were not compared: the model fails: {error}")
    return results, tuple(dict.fromkeys(skipped))


def _run(captured: Captured, case: Case) -> Reference:
    """The module's results in a case, with the runs of ids of the example (tokens of images) where
    it refuses others."""
    try:
        return case, captured.eager(*case)
    except Exception:
        if case is captured.example:
            raise
        program, pairs = captured.program, zip(captured.example, case, strict=True)
        example = [_as_long(tensor, other.shape) for tensor, other in pairs]
        inputs = with_runs(program, example, case)
        return inputs, captured.eager(*inputs)


def _as_long(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return with_sizes(tensor, shape, {})


def shapes(case: Case) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in case)
