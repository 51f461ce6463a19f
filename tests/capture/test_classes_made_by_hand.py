"""Classes that were made by hand, which are of no module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import moec

Scale = type("Scale", (), {"factor": 2.0})
Scale.__module__ = None  # type: ignore[assignment]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), Scale()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale.factor


def test_a_value_whose_class_is_of_no_module() -> None:
    module, x = Scaled().eval(), torch.randn(3, 4)
    model = moec.compile(module, (x,), verify=False)
    with torch.no_grad():
        torch.testing.assert_close(model(x), module(x))
