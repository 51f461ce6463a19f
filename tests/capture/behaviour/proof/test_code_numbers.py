"""The numbers that a module's code names."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from moec.capture.behaviour.proof.code_numbers import numbers_of_code

MOST = 91


class Inner(nn.Module):
    least = 92

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return helped(x) if len(x) > 93 else x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.limit = Inner(), 94
        self.config = SimpleNamespace(capacity=95, ratios=(96.0, 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        far = 97 * self.limit
        return helped(self.inner(x)) if len(x) < far else x


def helped(x: torch.Tensor, until: int = 98) -> torch.Tensor:
    return x * (0.5 if MOST < len(x) < until or len(x) in (99, 100) else 1.0)


def test_constants_locals_globals_and_attributes_are_numbers_of_the_code() -> None:
    module = Outer()
    numbers = numbers_of_code(module, lambda: module(torch.ones(2, 3)))
    assert {91, 92, 93, 94, 95, 96, 97, 98, 99, 100, 97 * 94} <= set(numbers)
    written = {93, 97, 99, 100}
    assert set(numbers[: len(written)]) == written
