"""Sizes that a model reads from its data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moec


class Scaled(nn.Module):
    """The number multiplies, and is the size of no tensor."""

    def forward(self, x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        factor = number.item()
        torch._check(factor >= 0)
        return x * factor


class Limited(nn.Module):
    """The number is compared alone."""

    def forward(self, x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        limit = number.item()
        torch._check(limit >= 0)
        torch._check(limit <= 100)
        return x + (torch.arange(x.shape[0]) < limit).float()[:, None]


@pytest.mark.parametrize("module", [Scaled(), Limited()], ids=["scaled", "limited"])
def test_a_number_that_is_no_size(module: nn.Module) -> None:
    compiled = moec.compile(module.eval(), (torch.randn(5, 4), torch.tensor(3)))
    x = torch.randn(7, 4)
    for number in (torch.tensor(0), torch.tensor(2), torch.tensor(9)):
        assert torch.equal(compiled(x, number), module(x, number))
