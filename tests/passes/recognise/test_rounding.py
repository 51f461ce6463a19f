"""A float32 model that rounds routing weights or scores to 16 bits does so on purpose: its blocks
round too. A 16-bit model rounds after every operator, and its blocks need not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.stable_topk import FirstOfEquals
from tests.capture.modules import WIDTH, Moe

Router = Callable[[Tensor], tuple[Tensor, Tensor]]


def rounded_weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).topk(2)
    return weights.half().float(), ids


def rounded_before_the_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).topk(2)
    weights = weights.bfloat16().float()
    return weights / weights.sum(-1, keepdim=True), ids


def rounded_scores(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.sigmoid().bfloat16().float().topk(2)
    return weights, ids


def rounded_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.half().float().softmax(-1).topk(2)
    return weights, ids


def scores_in_bfloat16(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.bfloat16().softmax(-1).float().topk(2)
    return weights, ids


class Routed(Moe):
    def __init__(self, router: Router, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.router = router

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(self.gate(x))
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == i)
            y = y.index_add(0, rows, expert(x[rows]) * weights[rows, slots, None].to(x.dtype))
        return y


def results(module: nn.Module, x: Tensor) -> tuple[int, Tensor, Tensor]:
    compiled = moec.compile(module.eval(), (x,), build=False)
    program = compiled.pass_results[-1].program
    with torch.no_grad(), FirstOfEquals():
        right = module(x)
    return len(compiled.blocks), evaluate(program.graph, [x], program.weights)[0], right


@pytest.mark.parametrize(
    "router",
    [
        rounded_weights,
        rounded_before_the_sum,
        rounded_scores,
        rounded_logits,
        scores_in_bfloat16,
    ],
)
def test_a_wide_model_keeps_its_rounding(router: Router) -> None:
    blocks, y, right = results(Routed(router), torch.randn(60, WIDTH))
    assert blocks == 1
    torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-6)


def test_a_model_in_sixteen_bits_is_recognised_with_its_router() -> None:
    module = Routed(rounded_weights, torch.bfloat16).eval()
    compiled = moec.compile(module, (torch.randn(6, WIDTH).bfloat16(),), build=False)
    assert [block.router for block in compiled.blocks] == ["softmax, top-2"]
