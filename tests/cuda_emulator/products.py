"""Dtypes by the names of kernels, their roundings, and dense products on the emulator."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moec.codegen.specs.products import LinearSpec
from tests.cuda_emulator.emulate import Schedule

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
"""The greatest relative error of one rounding, or more."""


def is_dense_product(
    run: Callable[..., None], spec: LinearSpec, rows: int, schedule: Schedule
) -> bool:
    """Whether run(x, w[, bias], y) computes the product, but for one rounding of the result and the
    errors of float32 sums in any order."""
    generator = torch.Generator().manual_seed(rows)
    dtype, out = TORCH[spec.dtype], TORCH[spec.y_dtype]
    x = torch.randn(rows, spec.k, generator=generator).to(dtype)
    w = (torch.randn(spec.n, spec.k, generator=generator) * spec.k**-0.5).to(dtype)
    bias = torch.randn(spec.n, generator=generator).to(dtype)
    exact = x.double() @ w.double().T + (bias.double() if spec.bias else 0)
    y = torch.full((rows, spec.n), torch.nan, dtype=out)
    run(x, w, *([bias] if spec.bias else []), y, schedule=schedule)
    allowed = UNIT[out] * exact.abs() + spec.k * 2.0**-24 * 8
    return bool(((y.double() - exact).abs() <= allowed).all())
