"""A branch on an input of integers is not equal both ways because its example was 0, or a mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.errors import CaptureError


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, loads: Tensor) -> Tensor:
        raise NotImplementedError


class Added(Layer):
    def forward(self, x: Tensor, loads: Tensor) -> Tensor:
        y = self.linear(x)
        if loads.sum() > 0:
            y = y + loads[:, None]
        return y


class Positive(Layer):
    def forward(self, x: Tensor, loads: Tensor) -> Tensor:
        y = self.linear(x)
        if loads.sum() > 0:
            return y * loads.clamp(min=0)[:, None]
        return y * 0


class Least(Layer):
    def forward(self, x: Tensor, loads: Tensor) -> Tensor:
        shift = loads.float()[:, None]
        if loads.max() < 1:
            shift = shift * 0
        return self.linear(x) + shift


class Both(Layer):
    """The sides are equal: nothing is refused."""

    def forward(self, x: Tensor, loads: Tensor) -> Tensor:
        share = loads.float() / 4
        if loads.sum() > 0:
            share = loads.float() * 0.5 - share
        return self.linear(x) + share[:, None]


@pytest.mark.parametrize("example", [[1, 0, 1, 1], [1, 1, 1, 1], [0, 2, 0, 5]])
@pytest.mark.parametrize("layer", [Added, Positive, Least])
def test_sides_that_differ_for_negative_integers(layer: type[Layer], example: list[int]) -> None:
    inputs = torch.randn(4, 8), torch.tensor(example)
    with pytest.raises(CaptureError, match="depends on what it reads from its data"):
        moec.compile(layer().eval(), inputs, stop_after="capture")


@pytest.mark.parametrize("layer", [Added, Positive])
def test_an_example_on_the_side_that_reads_nothing(layer: type[Layer]) -> None:
    """It does not show that there are as many loads as rows."""
    inputs = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)
    words = r"where `if loads.sum\(\) > 0:` is True, sizes must be equal .* give one that does"
    with pytest.raises(CaptureError, match=words):
        moec.compile(layer().eval(), inputs, stop_after="capture")


@pytest.mark.parametrize("example", [[0, 0, 0, 0], [1, 0, 1, 1], [0, 2, 0, 5]])
def test_equal_sides(example: list[int]) -> None:
    layer, x = Both().eval(), torch.randn(4, 8)
    model = moec.compile(layer, (x, torch.tensor(example)), verify=False)
    for loads in ([-5, 0, 0, 0], [0, 0, 0, 0], [7, 100, 0, -200]):
        with torch.no_grad():
            expected = layer(x, torch.tensor(loads))
        torch.testing.assert_close(model(x, torch.tensor(loads)), expected)
