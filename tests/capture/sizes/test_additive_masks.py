"""An additive mask that is left out at one token: -inf makes the softmax of one score NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moec


class Attention(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.function(x, bias)


def masked(x: Tensor, applies: bool, mask: Callable[[Tensor], Tensor]) -> Tensor:
    scores = x @ x.transpose(1, 2)
    if applies:
        scores = mask(scores)
    return scores.softmax(-1) @ x


def plain(x: Tensor, bias: Tensor) -> Tensor:
    return masked(x, x.shape[1] > 1, lambda scores: scores + bias[:, None])


def scaled(x: Tensor, bias: Tensor) -> Tensor:
    return masked(x, x.shape[1] > 1, lambda scores: scores + (bias * 2)[:, None])


def of_one_text(x: Tensor, bias: Tensor) -> Tensor:
    return masked(x, x.shape[0] > 1, lambda scores: scores + bias[:, None])


def filled(x: Tensor, bias: Tensor) -> Tensor:
    fill = (bias < -1)[:, None]
    return masked(x, x.shape[1] > 1, lambda scores: scores.masked_fill(fill, -torch.inf))


def fused(x: Tensor, bias: Tensor) -> Tensor:
    mask = bias[:, None, None] if x.shape[1] > 1 else None
    return F.scaled_dot_product_attention(*(x[:, None],) * 3, attn_mask=mask)[:, 0]


MASKS = {"zero": torch.zeros(2, 5), "masked": torch.tensor([[0.0, 0, 0, 0, -torch.inf]] * 2)}
MASKS["random"] = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("example", MASKS)
@pytest.mark.parametrize("attention", [plain, scaled, of_one_text, filled, fused])
def test_as_eager_at_one_token(attention: Any, example: str) -> None:
    module, least = Attention(attention).eval(), torch.finfo(torch.float32).min
    model = moec.compile(module, (torch.randn(2, 5, 8), MASKS[example]))
    for shape in ((1, 1), (2, 1), (1, 3)):
        for number in (0.0, -torch.inf, torch.inf, least):
            x, bias = torch.randn(*shape, 8), torch.zeros(shape)
            bias[:, -1] = number
            expected = module(x, bias)
            torch.testing.assert_close(model(x, bias), expected, equal_nan=True)


class Heads(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = x.view(*x.shape[:2], 2, 4).transpose(1, 2)
        scores = heads @ heads.transpose(2, 3) * 0.5 + mask
        return (scores.softmax(-1) @ heads).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("off", [0.0, -torch.inf, torch.finfo(torch.float32).min])
def test_fused_attention_is_not_judged_by_rows_without_a_key(off: float) -> None:
    mask = torch.full((5, 5), off).triu(1).expand(2, 1, 5, 5).clone()
    model = moec.compile(Heads(), (torch.randn(2, 5, 8), mask))  # which verifies it
    assert any(op.name == "nn.attention" for op in model.pass_results[-1].program.graph.ops)
