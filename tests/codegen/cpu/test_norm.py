"""rms_norm and layer_norm kernels against eager PyTorch."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import tvm
from torch import Tensor
from torch.nn.functional import layer_norm

from moec.codegen.build import compile_kernels
from moec.codegen.cpu.norm import norm
from moec.codegen.specs.norm import NormSpec
from moec.target.cpu import TARGETS, CpuTarget, host
from tests.codegen.cpu.attention.test_attention import shared

TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# One rounding of the result, twice where a rounded value is rounded again and the first may
# fall on the other side; f32: a sum of D squares in another order, and a root.
TOLERANCE = {"f32": 2.0**-20, "bf16": 2.0**-7, "f16": 2.0**-10}


def build(function: Any, target: CpuTarget) -> tvm.runtime.Module:
    return compile_kernels(function, target=target)


@cache
def norm_kernel(spec: NormSpec, target: CpuTarget) -> tvm.runtime.Module:
    return build(norm(spec, target, "f"), target)


def eager_norm(
    spec: NormSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The result in float64 and the scale of its error: a bias may cancel the rest of it."""
    if spec.kind == "layer":
        y = layer_norm(x.double(), (spec.width,), eps=spec.eps)
    else:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + spec.eps)
    if spec.round_first:
        y = y.to(x.dtype)
    y = y.double()
    if weight is not None:
        y = y * (weight.double() + (1 if spec.plus_one else 0))
    scale = y.abs()
    return (y, scale) if bias is None else (y + bias.double(), scale + bias.double().abs())


def check_norm(spec: NormSpec, target: CpuTarget, rows: int) -> None:
    dtype = TORCH[spec.x]
    x = (torch.randn(rows, spec.width) * 3 + 1).to(dtype)
    residual = torch.randn(rows, spec.width).to(dtype) if spec.residual else None
    weight = torch.randn(spec.width).to(TORCH[spec.weight]) if spec.weight else None
    bias = torch.randn(spec.width).to(TORCH[spec.bias]) if spec.bias else None
    total = torch.full_like(x, torch.nan) if spec.residual else None
    out = torch.full((rows, spec.width), torch.nan, dtype=TORCH[spec.out])
    tensors = [t for t in (x, residual, weight, bias, total, out) if t is not None]
    norm_kernel(spec, target)["f"](*map(shared, tensors))
    if residual is not None and total is not None:
        x = (x if spec.scale is None else x * spec.scale) + residual
        assert torch.equal(total, x)
    want, scale = eager_norm(spec, x, weight, bias)
    # (x - mean) loses what x and mean share.
    unit = TOLERANCE[spec.out] * (2 if spec.round_first else 1)
    assert ((out.double() - want).abs() <= unit * scale + 1e-6).all()


NORMS = {
    "llama": NormSpec("rms", 64, 1e-6, "f32", "f32", "f32", round_first=True),
    "llama-bf16": NormSpec("rms", 96, 1e-5, "bf16", "bf16", "bf16", round_first=True),
    "gpt-oss": NormSpec("rms", 80, 1e-5, "bf16", "bf16", "f32"),
    "gemma": NormSpec("rms", 48, 1e-6, "bf16", "bf16", "bf16", plus_one=True),
    "no-weight-f16": NormSpec("rms", 33, 1e-6, "f16", "f16", None),
    "residual": NormSpec("rms", 160, 1e-6, "bf16", "bf16", "bf16", residual=True, round_first=True),
    "scaled": NormSpec("rms", 72, 1e-6, "bf16", "bf16", "bf16", residual=True, scale=0.22),
    "narrow": NormSpec("rms", 7, 1e-6, "f32", "f32", "f32"),
    "layer": NormSpec("layer", 65, 1e-5, "f32", "f32", "f32", "f32"),
    "layer-bf16": NormSpec("layer", 128, 1e-5, "bf16", "bf16", "bf16", "bf16", residual=True),
}


@pytest.mark.parametrize("name", NORMS)
def test_norm_matches_eager(name: str) -> None:
    torch.manual_seed(0)
    for rows in (0, 1, 5, 40):
        check_norm(NORMS[name], host(), rows)


@pytest.mark.parametrize("target", ["generic", "avx2"])
@pytest.mark.parametrize("name", ["no-weight-f16", "residual", "layer"])
def test_norm_on_narrower_targets(name: str, target: str) -> None:
    torch.manual_seed(0)
    check_norm(NORMS[name], TARGETS[target], 3)


def test_rounding_first_is_what_llama_does() -> None:
    """Bit for bit, but for the rare value that the sum's order puts on a boundary."""
    torch.manual_seed(0)
    spec = NORMS["llama-bf16"]
    x, weight = torch.randn(50, 96).bfloat16(), torch.randn(96).bfloat16()
    out = torch.zeros_like(x)
    norm_kernel(spec, host())["f"](*map(shared, [x, weight, out]))
    root = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + spec.eps)
    want = weight * (x.float() * root).bfloat16()
    assert (out == want).float().mean() > 0.99


def test_norm_of_zeros_and_of_nan() -> None:
    x = torch.zeros(3, 64)
    x[1, 5] = torch.nan
    out = torch.ones_like(x)
    norm_kernel(NORMS["llama"], host())["f"](*map(shared, [x, torch.ones(64), out]))
    assert (out[[0, 2]] == 0).all()
    assert out[1].isnan().all()
