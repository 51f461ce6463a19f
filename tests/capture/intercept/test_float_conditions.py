"""Slices that end at a root or a power of sizes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moec.capture import capture
from moec.ir.interpret.evaluate import evaluate

LIMITS: dict[str, tuple[Callable[[int], int], str]] = {
    "root": (lambda n: 4 * (math.isqrt(n) + 1), "Min(u0, 4*isqrt(B*S) + 4)"),
    "divided": (lambda n: n // max(1, int(n**0.5)), "Min(u0, floor(B*S/Max(1, isqrt(B*S))))"),
    "may be negative": (lambda n: math.isqrt(n) - 3, ""),
    "power": (lambda n: int(n**0.75), ""),
}
"""Each with the length of the slice, empty where it is not the lesser of two."""


class Cut(nn.Module):
    """Adds one to the first positive rows."""

    def __init__(self, limit: Callable[[int], int]) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        flat = x.reshape(-1, width)
        rows = torch.where(flat[:, 0] > 0)[0]
        rows = rows[: self.limit(batch * length)]
        return flat.index_add(0, rows, torch.ones_like(flat[rows])).view(batch, length, width)


@pytest.mark.parametrize(("limit", "length"), LIMITS.values(), ids=LIMITS)
def test_the_length_of_a_slice_is_the_lesser_of_rows_and_limit(
    limit: Callable[[int], int], length: str
) -> None:
    torch.manual_seed(0)
    module = Cut(limit)
    captured = capture(module, (torch.randn(2, 7, 3),))
    graph = captured.program.graph
    lesser = {str(v.shape[0]) for op in graph.ops for v in op.outputs if "Min" in str(v.shape)}
    assert lesser == ({length} if length else set())
    for shape in ((0, 4, 3), (1, 1, 3), (1, 3, 3), (3, 11, 3)) if length else ():
        for x in (torch.randn(shape), torch.randn(shape).abs()):
            (actual,) = evaluate(graph, [x], captured.program.weights)
            torch.testing.assert_close(actual, module(x), rtol=0, atol=0)
