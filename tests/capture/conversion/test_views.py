"""Shapes of views where one size is left open."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moec


class Windows(nn.Module):
    """Adds the greatest of each window of four rows to all of them."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        windows = x.reshape(-1, 4, width)
        best = windows.norm(dim=-1).argmax(1)
        row = windows.gather(1, best[:, None, None].expand(-1, 1, width))
        return (windows + row).view(batch, length, width)


class Flattened(nn.Module):
    """Weighs windows of four rows by all of their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(-1, 4, 3)
        return (windows * self.gate(windows.flatten(1))[..., None]).view_as(x)


@pytest.mark.parametrize("module", [Windows(), Flattened()], ids=["chosen", "flattened"])
def test_windows_of_a_batch_may_be_none_and_may_cross_texts(module: nn.Module) -> None:
    """Of an empty batch, the length of a window was a quotient by zero."""
    compiled = moec.compile(module, (torch.randn(2, 8, 3),), verify=False)
    for shape in ((0, 4, 3), (2, 0, 3), (1, 4, 3), (2, 6, 3), (4, 1, 3), (3, 20, 3)):
        x = torch.randn(shape)
        # Sums of at most twelve products.
        torch.testing.assert_close(compiled(x), module(x).detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(moec.errors.InputError, match="must be a multiple of 4"):
        compiled(torch.randn(1, 5, 3))
