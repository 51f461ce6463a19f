"""A product in which one operand is a vector, over any leading axes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moec


class Products(nn.Module):
    """x[B, N, 4] -> x @ v, v @ x^T, and v @ v."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(4, dtype=dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x @ self.v, self.v @ x.transpose(1, 2), x[0, 0] @ x[0, 1]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_equal_to_eager(dtype: torch.dtype, tolerance: float) -> None:
    """Four products a sum: float32 in another order, bf16 rounded once."""
    torch.manual_seed(0)
    module, rows = Products(dtype), torch.export.Dim("B", min=1, max=64)
    tokens = torch.randn(3, 5, 4, dtype=dtype)
    model = moec.compile(module, (tokens,), dynamic_shapes=({0: rows},), verify=tolerance)
    x = torch.randn(7, 5, 4, dtype=dtype)
    with torch.no_grad():
        right = module(x)
    for ours, eager in zip(model(x), right, strict=True):
        torch.testing.assert_close(ours, eager, rtol=tolerance, atol=tolerance)
