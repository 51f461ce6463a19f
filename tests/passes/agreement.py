"""The programs of a compilation, and checks that they agree with the compiled module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from moec.ir.graph import Program
from moec.ir.interpret.evaluate import evaluate

CLOSE = 1e-5
"""f32 sums of a few terms, in another order."""


def programs_after(compiled: Any, *passes: str) -> list[Program]:
    """The programs after these passes of a compilation, by the names of the passes."""
    return [result.program for result in compiled.pass_results if result.name in passes]


def assert_agrees(module: nn.Module, programs: Iterable[Program], x: torch.Tensor) -> None:
    """Each program, with one input and one output, gives the results of eager."""
    with torch.no_grad():
        expected = module(x)
    for program in programs:
        (y,) = evaluate(program.graph, [x], program.weights)
        torch.testing.assert_close(y, expected, rtol=CLOSE, atol=CLOSE)
