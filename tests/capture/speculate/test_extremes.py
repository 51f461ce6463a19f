"""Experts that read the greatest or least of their rows: no MoE block, but captured as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moec.capture import capture
from moec.errors import CaptureError
from moec.interpret.evaluate import evaluate

E, D = 3, 6


class Layer(nn.Module):
    def __init__(self, extreme: Callable[[Tensor], Tensor], skips: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(D, E)
        self.extreme, self.skips = extreme, skips

    def forward(self, x: Tensor) -> Tensor:
        ids = self.gate(x).argmax(-1)
        out = torch.zeros_like(x)
        for expert in range(E):
            rows = torch.where(ids == expert)[0]
            if self.skips and rows.numel() == 0:
                continue
            out.index_add_(0, rows, x[rows] * expert - self.extreme(x[rows]))
        return out


def of_one_axis(rows: Tensor) -> Tensor:
    return rows.amax(0) + torch.amin(rows, dim=0, keepdim=True) + rows.logsumexp(0)


def with_indices(rows: Tensor) -> Tensor:
    greatest, index = rows.max(0, keepdim=True)
    return greatest - rows.min(dim=0).values + index


def of_two_tensors(rows: Tensor) -> Tensor:
    return torch.min(rows, torch.maximum(rows, rows * 0.5)).max(rows * 2).sum(0)


@pytest.mark.parametrize("extreme", [of_one_axis, with_indices, of_two_tensors])
def test_an_extreme_of_the_rows_of_an_expert(extreme: Callable[[Tensor], Tensor]) -> None:
    module = Layer(extreme).eval()
    listed = capture(module, (torch.randn(6, D),))
    assert listed.other is not None
    forms = [listed, listed.other()] if extreme is of_one_axis else [listed]
    for x in (torch.randn(1, D), torch.randn(9, D), torch.ones(4, D)):
        with torch.no_grad():
            expected = module(x)
        for form in forms:
            (actual,) = evaluate(form.program.graph, [x], form.program.weights)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_an_extreme_of_no_rows_has_no_mask() -> None:
    form = capture(Layer(of_one_axis, skips=False).eval(), (torch.randn(6, D),))
    while form.way != "speculated":
        assert form.other is not None
        form = form.other()
    assert form.other is not None
    with pytest.raises(CaptureError, match="rows that data choose, which may be none"):
        form.other()
