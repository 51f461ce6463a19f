"""log(1 + x) has all digits of x, however small: routers renormalise scores of softplus."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moec


class Softplus(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return nn.functional.softplus(x), x.exp().log1p()


class Log1p(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.log1p()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5e-7), (torch.float64, 2e-15)])
def test_relative_errors(dtype: torch.dtype, limit: float) -> None:
    """A few roundings, relative to each result and not to the greatest."""
    small = torch.logspace(-30, 6, 999, dtype=dtype)
    x = torch.cat([small, -small[small < 0.999]]).reshape(1, -1)
    compiled = moec.compile(Log1p(), (x,), verify=False)
    torch.testing.assert_close(compiled(x), x.log1p(), rtol=limit, atol=0)
    logits = torch.linspace(-60, 30, 2000, dtype=dtype).reshape(1, -1)
    compiled = moec.compile(Softplus(), (logits,), verify=False)
    for result, right in zip(compiled(logits), Softplus()(logits), strict=True):
        torch.testing.assert_close(result, right, rtol=limit, atol=0)


def test_the_ends_of_the_domain() -> None:
    x = torch.tensor([[0.0, -0.0, -1.0, -2.0, torch.inf, torch.nan, 1e30]])
    torch.testing.assert_close(
        moec.compile(Log1p(), (x,), verify=False)(x), x.log1p(), rtol=5e-7, atol=0, equal_nan=True
    )
