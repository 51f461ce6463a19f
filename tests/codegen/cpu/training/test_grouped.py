"""Products with unpacked weights, and their gradients, for any routing and target."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.codegen.cpu.training.grouped import mixed, outer, product
from moec.codegen.cpu.training.loops import MatrixStack
from moec.target.cpu import TARGETS, missing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RUNNABLE = [t for t in TARGETS.values() if not missing(t) and t.name not in ("amx", "avx2-vnni")]
BEST = RUNNABLE[-1]
# The relative error of a sum of products of order 1: float32 sums of at most a few hundred of
# them in another order, then rounding to the type.
CLOSE = {"float32": 1e-4, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# Pairs of whole vectors, and widths that no pair and no vector fits.
SHAPES = [("float32", 96, 192), ("bfloat16", 96, 192), ("float32", 33, 70), ("float16", 33, 70)]


def wanted(x: Tensor, ends: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x @ w[e]^T + b[e] in float64."""
    y = torch.zeros(len(x), w.shape[1], dtype=torch.float64)
    start = 0
    for e, end in enumerate(ends.tolist()):
        y[start:end] = x[start:end].double() @ w[e].double().T
        y[start:end] += 0 if b is None else b[e].double()
        start = end
    return y


def wanted_outer(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    pieces = [slice(*pair) for pair in zip([0, *ends.tolist()], ends.tolist(), strict=False)]
    return torch.stack([dy[sample].double().T @ x[sample].double() for sample in pieces])


def check(result: Tensor, expected: Tensor, dtype: str) -> None:
    error = (result.double() - expected).abs() / (1 + expected.abs())
    assert result.numel() == 0 or error.nan_to_num(1e9).max() <= CLOSE[dtype]


@cache
def kernels(build, target, stack: MatrixStack, biased: bool):
    kernels = (product(target, stack, biased), mixed(target, stack, biased), outer(target, stack))
    return [build(target, kernel) for kernel in kernels]


def run(
    build, target, stack: MatrixStack, biased: bool, counts: list[int], nobody: int = 0
) -> None:
    """All three, into memory that holds NaN."""
    dtype = DTYPES[stack.dtype]
    ends = torch.tensor(counts).cumsum(0).int()
    rows = sum(counts) + nobody
    x, dy = torch.randn(rows, stack.k).to(dtype), torch.randn(rows, stack.n).to(dtype)
    w = (torch.randn(stack.experts, stack.n, stack.k) * 0.2).to(dtype)
    biases = [torch.randn(stack.experts, n).to(dtype) for n in (stack.n, stack.k)]
    private = [[b] if biased else [] for b in biases]
    y, dx, dw = (torch.full_like(t, float("nan")) for t in (dy, x, w))
    forward, backward, gradient = kernels(build, target, stack, biased)
    forward(x, ends, w, *private[0], y)
    backward(dy, ends, w, *private[1], dx)
    gradient(dy, x, ends, dw)
    check(y, wanted(x, ends, w, *private[0]), stack.dtype)
    check(dx, wanted(dy, ends, w.mT, *private[1]), stack.dtype)
    check(dw, wanted_outer(dy, x, ends), stack.dtype)


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
def test_any_target(build, target) -> None:
    run(build, target, MatrixStack(4, 32, 96, "bfloat16"), True, [7, 0, 13, 1], nobody=3)


@pytest.mark.parametrize(("dtype", "n", "k"), SHAPES)
def test_any_shape(build, dtype: str, n: int, k: int) -> None:
    """With more rows of an expert than any kernel takes at once, and an odd number of them."""
    run(build, BEST, MatrixStack(3, n, k, dtype), False, [1, 0, 601], nobody=2)


@settings(max_examples=30)
@given(
    counts=st.lists(st.integers(0, 9), min_size=3, max_size=3),
    nobody=st.integers(0, 3),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_any_routing(build, counts: list[int], nobody: int, dtype: str) -> None:
    """Experts without rows, none with any, one with all."""
    run(build, BEST, MatrixStack(3, 96, 192, dtype), False, counts, nobody)


def test_what_is_no_number_stays_with_its_expert(build) -> None:
    """Odd rows are paired with none, and never with those of the next expert."""
    stack = MatrixStack(3, 96, 192, "bfloat16")
    ends = torch.tensor([3, 5, 5], dtype=torch.int32)
    x, dy = torch.randn(5, 192).bfloat16(), torch.randn(5, 96).bfloat16()
    x[3:], dy[3:] = float("nan"), float("inf")
    dw = torch.empty(3, 96, 192).bfloat16()
    kernels(build, BEST, stack, False)[2](dy, x, ends, dw)
    check(dw[0], wanted_outer(dy[:3], x[:3], ends[:1])[0], "bfloat16")
    assert dw[1].isnan().all()
