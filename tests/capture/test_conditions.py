"""Conditions on masks are removed if that provably changes nothing, and refused otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moec.capture import capture
from moec.errors import CaptureError
from moec.ir.interpret.evaluate import evaluate

EXPERTS, WIDTH = 4, 8
Asks = Callable[[Tensor, Tensor, int], bool]
ASKS: dict[str, Asks] = {
    "any": lambda chosen, _, e: bool((chosen == e).any()),
    "torch.any of any": lambda chosen, _, e: bool(torch.any((chosen == e).any(-1))),
    "not any": lambda chosen, _, e: not bool(torch.logical_not((chosen == e).any())),
    "sum": lambda chosen, _, e: bool((chosen == e).sum() > 0),
    "sum as truth": lambda chosen, _, e: bool((chosen == e).sum()),
    "sum is 0": lambda chosen, _, e: not bool((chosen == e).sum() == 0),
    "item": lambda chosen, _, e: (chosen == e).sum().item() >= 1,
    "bincount": lambda _, counts, e: bool(counts[e] != 0),
    "bincount, below 1": lambda _, counts, e: not bool(counts.to(torch.int32)[e] < 1),
    "len": lambda chosen, _, e: len(torch.where(chosen == e)[0]) > 0,
    "len of nonzero": lambda chosen, _, e: len((chosen == e).nonzero()) != 0,
}


class Block(nn.Module):
    """Top-1 of four linear experts; `asks` checks whether an expert has rows."""

    def __init__(self, asks: Asks, each: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ParameterList(torch.randn(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.asks, self.each = asks, each

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(1)
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS)
        total = torch.zeros_like(x)
        for number in range(EXPERTS):
            if not self.asks(chosen, counts, number):
                continue
            token, slot = torch.where(chosen == number)
            rows = x[token] @ self.experts[number] * weights[token, slot, None]
            total = self.each(total.index_add(0, token, rows))
        return total


@pytest.mark.parametrize("asks", ASKS.values(), ids=ASKS.keys())
def test_a_condition_that_skips_nothing_is_left_out(asks: Asks) -> None:
    block = Block(asks)
    captured = capture(block, (torch.randn(9, WIDTH),))
    for tokens in (1, 2, 11):
        x = torch.randn(tokens, WIDTH)
        (actual,) = evaluate(captured.program.graph, [x], captured.program.weights)
        torch.testing.assert_close(actual, block(x))


def test_refuses_a_condition_that_matters() -> None:
    """With many tokens every expert has rows; only a single token shows the difference."""
    block = Block(ASKS["any"], each=lambda y: y + 1)
    words = r"any\(\)\),` was taken to be True\n  eager differs by"
    with pytest.raises(CaptureError, match=words):
        capture(block, (torch.randn(64, WIDTH),))


class Doubled(nn.Module):
    """No single example shows whether a branch on its numbers matters."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.least = least

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if (x > self.least).any() else x


def test_refuses_a_condition_that_was_never_unset() -> None:
    with pytest.raises(CaptureError, match=r"one way only\n  test_conditions\.py:\d+: `return x"):
        capture(Doubled(-100), (torch.randn(5, 3),))


def test_refuses_a_condition_that_does_not_hold() -> None:
    with pytest.raises(CaptureError, match=r"was taken to be False\n  in .* runs of eager"):
        capture(Doubled(100), (torch.randn(5, 3),))


def test_an_example_without_rows_is_as_good_as_any() -> None:
    block = Block(ASKS["any"])
    captured = capture(block, (torch.zeros(0, WIDTH),))
    x = torch.randn(5, WIDTH)
    (actual,) = evaluate(captured.program.graph, [x], captured.program.weights)
    torch.testing.assert_close(actual, block(x))
