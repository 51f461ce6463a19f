"""Loops over the experts that at least one token chose, in common forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from moec.capture import capture
from moec.errors import CaptureError
from moec.ir.interpret.evaluate import evaluate

EXPERTS, WIDTH = 3, 8
Loop = Callable[["Block", torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """Top-1 of three linear experts, summed by `loop`."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ParameterList(torch.randn(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.loop = loop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(1)
        return self.loop(self, x, weights, ids)


def a_place_for_no_expert(
    block: Block, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    mask = nn.functional.one_hot(ids, EXPERTS + 1).permute(2, 1, 0)
    total = torch.zeros_like(x)
    for hit in (mask.sum((-1, -2)) > 0).nonzero():
        slot, token = torch.where(mask[hit[0]])
        total.index_add_(0, token, x[token] @ block.experts[hit[0]] * weights[token, slot, None])
    return total


def skipping_the_idle(
    block: Block, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    mask = nn.functional.one_hot(ids, EXPERTS).permute(2, 1, 0)
    total = torch.zeros_like(x)
    for hit in (mask.sum((-1, -2)) > 0).nonzero(as_tuple=False):
        expert = int(hit.item())
        slot, token = torch.where(mask[expert])
        if token.numel() == 0:
            continue
        total.index_add_(0, token, x[token] @ block.experts[expert] * weights[token, slot, None])
    return total


def skipping_over_a_range(
    block: Block, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    total = torch.zeros_like(x)
    for expert in range(EXPERTS):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        if token.shape[0] == 0:
            continue
        total[token] += x[token] @ block.experts[expert] * weights[token, slot, None]
    return total


def counting_the_busy(
    block: Block, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    mask = nn.functional.one_hot(ids, EXPERTS).permute(2, 1, 0)
    total = torch.zeros_like(x)
    for _ in (mask.sum((-1, -2)) > 0).nonzero():
        total = total + 1
    return total * weights


@pytest.mark.parametrize("loop", [a_place_for_no_expert, skipping_the_idle, skipping_over_a_range])
def test_runs_for_every_expert(loop: Loop) -> None:
    block = Block(loop)
    captured = capture(block, (torch.randn(5, WIDTH),))
    for tokens in (1, 2, 9):  # of one token, two experts are idle
        x = torch.randn(tokens, WIDTH)
        (actual,) = evaluate(captured.program.graph, [x], captured.program.weights)
        torch.testing.assert_close(actual, block(x))


def test_refuses_a_loop_in_which_idle_experts_count() -> None:
    block = Block(counting_the_busy)
    x = torch.randn(1, WIDTH).expand(5, WIDTH).contiguous()  # one busy expert
    words = r"for _ in \(mask.sum.* reads data into Python\n  eager differs"
    with pytest.raises(CaptureError, match=words):
        capture(block, (x,))
