"""The kernel of linear attention against the reference, for each kind of decay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
import tvm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moec.codegen.build import compile_kernels
from moec.codegen.cpu.attention.linear_attention import linear_attention
from moec.codegen.specs.attention import LinearAttentionSpec
from moec.ir.ops.dense.linear_attention import recurrence
from moec.target.cpu import TARGETS, CpuTarget, host

SPECS = {
    "gated delta rule": LinearAttentionSpec(2, 4, 16, 24, "head", True, False),
    "kimi delta rule": LinearAttentionSpec(3, 3, 18, 32, "key", True, True),
    "mamba 2": LinearAttentionSpec(1, 4, 7, 16, "head", False, True),
    "mamba": LinearAttentionSpec(1, 1, 16, 40, "rate", False, False),
    "narrow": LinearAttentionSpec(1, 2, 1, 1, "key", True, False),
}
# Sums of at most 24 float32 products in another order, which the state carries on; the
# exponential is within an ulp.
TOLERANCE = 2e-5


@cache
def kernel(spec: LinearAttentionSpec, target: CpuTarget) -> Callable[..., None]:
    function = compile_kernels(linear_attention(spec, target, "f"), target=target)["f"]

    def call(*tensors: Tensor) -> None:
        function(*(shared(t) for t in tensors))

    return call


def shared(t: Tensor) -> object:
    """The same memory; torch gives empty tensors strides that TVM takes for a gap."""
    return tvm.runtime.from_dlpack(t) if t.numel() else tvm.runtime.empty(t.shape, "float32")


def draw(spec: LinearAttentionSpec, batch: int, length: int) -> tuple[list[Tensor], list[Tensor]]:
    keys = (batch, length, spec.shared, spec.key_dim)
    per_head = (batch, length, spec.heads)
    state = (spec.heads, spec.key_dim, spec.value_dim)
    each = {"head": (), "key": (spec.key_dim,), "rate": (spec.value_dim,)}[spec.per]
    sign = 1 if spec.per == "rate" else -1
    k = torch.randn(keys)
    k = k / k.norm(dim=-1, keepdim=True)  # the delta rule does not grow
    values, decay = torch.randn(*per_head, spec.value_dim), sign * torch.rand(*per_head, *each)
    rest = [-torch.rand(state)] if spec.per == "rate" else []
    rest += [torch.rand(per_head)] if spec.delta else []
    rest += [torch.randn(batch, *state)] if spec.started else []
    return [torch.randn(keys), k, values, decay], rest


def check(spec: LinearAttentionSpec, target: CpuTarget, batch: int, length: int) -> None:
    tensors, rest = draw(spec, batch, length)
    flags = {"rates": spec.per == "rate", "beta": spec.delta, "start": spec.started}
    names = (name for name, flag in flags.items() if flag)
    want = recurrence(*tensors, **dict(zip(names, rest, strict=True)))
    actual = [torch.full_like(x, torch.nan) for x in want]
    kernel(spec, target)(*tensors, *rest, *actual)
    for ours, theirs in zip(actual, want, strict=True):
        if ours.numel():
            torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", SPECS)
@given(batch=st.integers(0, 3), length=st.integers(0, 70))
def test_as_its_meaning(name: str, batch: int, length: int) -> None:
    check(SPECS[name], host(), batch, length)


@pytest.mark.parametrize("target", ["generic", "avx2"])
@pytest.mark.parametrize("name", ["kimi delta rule", "mamba"])
def test_on_narrower_targets(name: str, target: str) -> None:
    torch.manual_seed(0)
    check(SPECS[name], TARGETS[target], 2, 9)


def test_nan_stays_where_it_is() -> None:
    """In the batch and the head that it comes from, and from its position on."""
    spec = replace(SPECS["gated delta rule"], shared=4)
    tensors, rest = draw(spec, 2, 5)
    tensors[1][0, 2, 1] = torch.nan
    y, end = torch.empty_like(tensors[2]), torch.empty(2, 4, 16, 24)
    kernel(spec, host())(*tensors, *rest, y, end)
    lost = torch.zeros_like(y, dtype=torch.bool)
    lost[0, 2:, 1] = True
    assert torch.equal(y.isnan(), lost)
