"""The combine: summation order, choices without an expert, widths with tails, every dtype."""

from __future__ import annotations

import pytest
import torch

from moec.codegen.cpu.routing.dispatch import combine
from moec.target.cpu import TARGETS, missing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ELSEWHERE = ("amx", "avx2-vnni")  # gemm/test_amx_tile.py, quantised/test_grouped.py
RUNNABLE = [t for t in TARGETS.values() if not missing(t) and t.name not in ELSEWHERE]
each_target = pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)


def problem(t: int, k: int, width: int, owned: int):
    """Rows, a random permutation of slots, and ends of 3 experts that own `owned` rows."""
    y = torch.randn(t * k, width)
    y[owned:] = float("nan")  # what nobody owns must not be read
    slots = torch.randperm(t * k).int().reshape(t, k)
    ends = torch.tensor([0, owned // 2, owned], dtype=torch.int32)
    return y, slots, ends


def expected(y, slots, weights, owned):
    rows = y.double()[slots.long()] * weights.double().unsqueeze(-1)
    return torch.where((slots < owned).unsqueeze(-1), rows, 0.0).sum(1)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 37, 256, 1100])
def test_weighted_sums(build, rounding, target, dtype, width):
    k, out_dtype = 4, DTYPES[dtype]
    kernel = build(
        target,
        combine(target, 3, k, width, dtype, weights_dtype=dtype, addend_dtype=dtype),
    )
    for t in (0, 1, 9):
        owned = t * k * 2 // 3
        y, slots, ends = problem(t, k, width, owned)
        weights = torch.rand(t, k).to(out_dtype)
        weights[slots >= owned] = float("inf")
        addend = torch.randn(t, width).to(out_dtype)
        out = torch.empty(t, width, dtype=out_dtype)
        kernel(y, slots, ends, weights, addend, out)
        exact = expected(y, slots, weights.nan_to_num(posinf=0.0), owned) + addend.double()
        allowed = rounding[out_dtype] * exact.abs() + 6 * 2.0**-24 * 8
        assert ((out.double() - exact).abs() <= allowed).all()


@each_target
def test_without_weights_rows_are_added_as_they_are(build, target):
    y, slots, ends = problem(6, 2, 40, 12)
    out = torch.empty(6, 40)
    build(target, combine(target, 3, 2, 40, "float32", weights_dtype=None))(y, slots, ends, out)
    assert torch.equal(out, y[slots[:, 0].long()] + y[slots[:, 1].long()])


def test_the_sum_runs_in_the_order_of_the_slots(build):
    """1e8 + 1 - 1e8 in float32 is 0; in any other order it is 1."""
    y = torch.tensor([[-1e8], [1.0], [1e8]])
    slots = torch.tensor([[2, 1, 0], [0, 2, 1]], dtype=torch.int32)
    ends = torch.tensor([3], dtype=torch.int32)
    target, out = TARGETS["generic"], torch.empty(2, 1)
    function = build(target, combine(target, 1, 3, 1, "float32", weights_dtype=None))
    y = torch.cat([y, y])
    ends[0] = 6
    function(y, slots, ends, out)
    assert out.flatten().tolist() == [0.0, 1.0]
