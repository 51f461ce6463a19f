"""Capacities of floats beside rows that data choose: integer divisions where floats round so."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from moec.capture import capture
from moec.ir.interpret.evaluate import evaluate
from tests.capture.modules import Function

CAPACITIES: dict[str, Callable[[int], int]] = {
    "a root": lambda n: max(1, math.isqrt(n)),
    "a root rounded up": lambda n: math.ceil(math.sqrt(n) * 1.5),
    "a power": lambda n: int(n**0.75),
    "a quotient of a float": lambda n: int(n * 1.25 // 4),
    "a quotient by a whole float": lambda n: int(n // 4.0) + 1,
}


@pytest.mark.parametrize("name", CAPACITIES)
def test_a_capacity_that_is_no_multiple_of_a_size_stays_a_float(name: str) -> None:
    def cut(x: torch.Tensor) -> torch.Tensor:
        token, capacity = torch.where(x[:, 0] > 0)[0], CAPACITIES[name](x.shape[0])
        if len(token) > capacity:
            token = token[:capacity]
        return torch.zeros_like(x).index_add(0, token, x[token])

    captured = capture(Function(cut), (torch.randn(12, 3),))
    for size in (1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 33, 90):
        for x in (torch.randn(size, 3), torch.ones(size, 3)):
            (ours,) = evaluate(captured.program.graph, (x,), captured.program.weights)
            assert torch.equal(ours, cut(x)), size
