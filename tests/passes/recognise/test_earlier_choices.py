"""Choices and weights that a block's own are computed from: these are routed, the rest stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec
from moec.ir.interpret.evaluate import evaluate
from tests.passes.recognise.test_saturated_scores import Chosen, D, E, K


class Scaled(Chosen):
    """A scale for each expert after the routing, as in Gemma 4."""

    experts_of_router, words = E, "softmax, top-2, renormalised, weights changed"

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, self.experts_of_router, bias=False)
        self.scale = nn.Parameter(torch.rand(E) + 0.5)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = logits.softmax(-1).topk(K)
        return weights / weights.sum(-1, keepdim=True) * self.scale[ids], ids


class Beside(Scaled):
    """Weights that share their sum with an expert beside, as in Inkling."""

    experts_of_router, words = E + 1, "correction bias, top-2, weights of its own"

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids = (logits.sigmoid()[:, :E] + self.scale).topk(K).indices
        chosen = torch.cat([logits[:, :E].gather(1, ids), logits[:, E:]], 1)
        return chosen.softmax(-1)[:, :K], ids


class Skipped(Scaled):
    """An expert without a network, replaced by the first, with a weight of 0, as in ZAYA."""

    experts_of_router = E + 1
    words = "softmax, top-2, some choices replaced, weights changed"

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = logits.softmax(-1).topk(K)
        skipped = ids == E
        return weights.masked_fill(skipped, 0), ids.masked_fill(skipped, 0)


class Limited(Scaled):
    """Tokens beyond a capacity choose no expert, as in Switch Transformers."""

    words = "softmax, top-1, some choices replaced"

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        hot = F.one_hot(scores.argmax(-1), E)
        hot = hot * (hot.cumsum(0) <= 5)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = hot[:, e].bool()
            y[rows] = expert(x[rows])
        return y * scores.max(-1, keepdim=True).values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits(dtype: torch.dtype) -> None:
    """One choice a token, [B, S], is compared with rows of k."""
    torch.manual_seed(0)

    class Sequences(Limited):
        def forward(self, x: Tensor) -> Tensor:
            scores = self.gate(x).softmax(-1)
            hot = F.one_hot(scores.argmax(-1), E)
            hot = hot * (hot.cumsum(1) <= 5)
            y = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                rows = hot[..., e].bool()
                y[rows] = expert(x[rows])
            return y * scores.max(-1, keepdim=True).values

    module = Sequences().to(dtype).eval()
    model = moec.compile(module, (torch.randn(2, 6, D, dtype=dtype),), build=False)
    assert [block.router for block in model.blocks] == [Sequences.words]


@pytest.mark.parametrize("form", [Scaled, Beside, Skipped, Limited])
def test_as_eager(form: type[Scaled]) -> None:
    torch.manual_seed(0)
    module = form().eval()
    model = moec.compile(module, (torch.randn(6, D),), build=False)
    assert [block.router for block in model.blocks] == [form.words]
    program = model.pass_results[-1].program
    for tokens in (0, 1, 50):
        x = torch.randn(tokens, D)
        (y,) = evaluate(program.graph, [x], program.weights)
        torch.testing.assert_close(y, module(x).detach(), atol=1e-5, rtol=1e-5)
