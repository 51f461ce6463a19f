"""Experts that several gates weigh are left to PyTorch, which runs them once."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import moec
from moec.dynamo import FallbackWarning
from tests.passes.forms import multi_gate
from tests.passes.forms.sizes import D

WHY = "several gates weigh its experts, which would run for each"


@pytest.mark.parametrize("gates", [1, 3])
def test_gates(gates: int) -> None:
    """Float32 with sums of at most 16 terms: 1e-5."""
    torch.manual_seed(0)
    module, x = multi_gate.MultiGate().eval(), torch.randn(6, D)
    module.gates = module.gates[:gates]
    compiled = torch.compile(module, backend="moec")
    warned = pytest.warns(FallbackWarning, match=WHY) if gates > 1 else nullcontext()
    with torch.no_grad(), warned:
        for actual, expected in zip(compiled(x), module(x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert moec.stats().blocks == (1 if gates == 1 else 0)
    assert {fallback.reason for fallback in moec.stats().fallbacks} == (
        {WHY} if gates > 1 else set()
    )
