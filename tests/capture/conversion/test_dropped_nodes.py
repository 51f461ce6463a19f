"""Assertions on data, and the numbers that only these read, are in no graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moec.capture import capture
from moec.ir.interpret.evaluate import evaluate

SIZES = (1, 6, 9)

ASSERTED: dict[str, Callable[[Tensor], Any]] = {
    "all of a tensor": lambda x: torch._check_tensor_all(x.isfinite()),
    "a count": lambda x: torch._check_tensor_all((x > 9).sum() * x.shape[1] == 0),
    "asynchronously": lambda x: torch._assert_async(x.isfinite().all()),
    "a number": lambda x: torch._check((x > 9).sum().item() == 0),
    "arithmetic": lambda x: torch._check((x > 9).sum().item() * 3 + 1 < x.shape[0] + 2),
}


class Asserting(nn.Module):
    """torch traces the export of such a write once more, and the condition is no constant then."""

    def __init__(self, check: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.check = check

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return x.masked_fill(x > 3, 0.0).index_put((x > 9,), torch.tensor(0.0)) * 2


@pytest.mark.parametrize("name", ASSERTED)
def test_assertions_are_traced(name: str) -> None:
    captured = capture(Asserting(ASSERTED[name]).eval(), (torch.zeros(6, 8),))
    assert captured.way == "traced"
    graph = captured.program.graph
    for size in SIZES:
        x = torch.rand(size, 8)
        (actual,) = evaluate(graph, [x], captured.program.weights)
        assert torch.equal(actual, x * 2)
