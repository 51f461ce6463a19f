"""The work of the passes grows linearly with the graph: counted in calls, not seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType

import pytest
import torch
from torch import nn

from moec import passes
from moec.capture import capture
from moec.passes.core.runner import run
from moec.pipeline import choose
from moec.report.blocks import blocks

WIDTH = 8
ROOT = passes.__path__[0]


class CapacityLayer(nn.Module):
    """Top-2 with a capacity for each expert, rows beyond it dropped, in a loop over experts."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 12), nn.SiLU(), nn.Linear(12, WIDTH))
            for _ in range(experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2, -1)
        mask = nn.functional.one_hot(ids.flatten(), len(self.experts))
        position = ((mask.cumsum(0) - 1) * mask).sum(-1).view_as(ids)
        weights = weights * (position < 6)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            share = (weights * (ids == i)).sum(-1, keepdim=True)
            out = out + share * expert(x)
        return x + out


@contextmanager
def counted(calls: list[int]) -> Iterator[None]:
    """While open, calls of functions of passes/ are counted: every rule, match and proof is one."""

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(ROOT):
            calls[0] += 1

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


@cache
def calls_of(layers: int, experts: int) -> tuple[int, int]:
    """(ops of the capture, calls) of all passes of the default level."""
    torch.manual_seed(0)
    module = nn.Sequential(*(CapacityLayer(experts) for _ in range(layers)))
    program = capture(module, (torch.randn(6, WIDTH),)).program
    calls = [0]
    with counted(calls):
        results = run(program, choose(2, ()))
    assert max(len(blocks(result.program.graph)) for result in results) == layers
    return len(program.graph.ops), calls[0]


@pytest.mark.parametrize(
    ("small", "large"), [((1, 4), (4, 4)), ((1, 4), (1, 16))], ids=["layers", "experts"]
)
def test_work_grows_with_the_graph(small: tuple[int, int], large: tuple[int, int]) -> None:
    (few_ops, few_calls), (more_ops, more_calls) = calls_of(*small), calls_of(*large)
    assert more_calls / few_calls <= 1.25 * more_ops / few_ops
