"""Vectors: every float dtype in memory, tails that access nothing beyond, and the functions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from tvm.script.ir_builder import tirx as T

from moec.codegen.cpu.frame import argument, kernel
from moec.codegen.cpu.vector import Vector
from moec.target.cpu import TARGETS, missing
from tests.cuda_emulator.products import TORCH

DTYPES = TORCH | {"float64": torch.float64}
RUNNABLE = [t for t in TARGETS.values() if not missing(t) and t.name != "avx2-vnni"]
each_target = pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)


def elementwise(target, functions, x_dtype="float32", y_dtype="float32"):
    """A kernel (x[n], y[len(functions), n]), n a multiple of the lanes."""
    v = Vector(target)
    with kernel("f", target) as frame:
        n = T.int64()
        x = argument("x", (n,), x_dtype)
        y = argument("y", (len(functions), n), y_dtype)
        with T.serial(0, T.truncdiv(n, T.int64(v.lanes))) as i:
            for row, function in enumerate(functions):
                v.store(y, [row, i * v.lanes], function(v, v.load(x, [i * v.lanes])))
    return frame.function


@each_target
def test_conversions_are_exact(build, target):
    def same(v, x):
        return x

    halves = torch.arange(65536).to(torch.int32).to(torch.int16)
    singles = torch.randint(-(2**31), 2**31, (1 << 18,), dtype=torch.int64).int()
    singles = torch.cat([singles.view(torch.float32), torch.randn(1 << 14) * 1e-6])
    singles = torch.cat([singles, halves.view(torch.float16).float()])
    for name in ("float16", "bfloat16"):
        dtype = DTYPES[name]
        wide = torch.empty(1, 65536)
        build(target, elementwise(target, [same], x_dtype=name))(halves.view(dtype), wide)
        assert torch.equal(wide[0].nan_to_num(7.0), halves.view(dtype).float().nan_to_num(7.0))

        narrow = torch.empty(1, len(singles), dtype=dtype)
        build(target, elementwise(target, [same], y_dtype=name))(singles, narrow)
        expected = singles.to(dtype)
        if name == "bfloat16" and target.bf16_dot:  # the instruction takes subnormals for 0
            expected = torch.where(singles.abs() < 2.0**-126, singles * 0, singles).to(dtype)
        assert torch.equal(narrow[0].isnan(), expected.isnan())
        assert torch.equal(narrow[0].nan_to_num(7.0), expected.nan_to_num(7.0))


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_tails_touch_nothing_beyond(build, target, dtype):
    """All counts, known when the kernel is built and not."""
    v = Vector(target)
    n = v.lanes
    with kernel("f", target) as frame:
        x, stored, loaded, late = (
            argument(name, (n, 2 * n), dtype) for name in ("x", "stored", "loaded", "late")
        )
        counts = argument("counts", (n,), "int32")
        for i in range(n):
            v.store_tail(stored, [i, 3], v.load(x, [i, 1]) + v.splat(1.0), i)
            v.store(loaded, [i, 3], v.load_tail(x, [i, 1], i) + v.splat(1.0))
        with T.serial(0, n) as i:
            value = v.load_tail(x, [i, 1], counts[i]) + v.splat(1.0)
            v.store_tail(late, [i, 3], value, counts[i])
    x = torch.randint(1, 100, (n, 2 * n)).to(DTYPES[dtype])
    stored, loaded, late = (torch.full_like(x, -1) for _ in range(3))
    build(target, frame.function)(x, stored, loaded, late, torch.arange(n, dtype=torch.int32))
    for i in range(n):
        row = torch.full_like(x[0], -1)
        row[3 : 3 + i] = x[i, 1 : 1 + i] + 1
        assert torch.equal(stored[i], row)
        assert torch.equal(late[i], row)
        row[3 + i : 3 + n] = 1
        assert torch.equal(loaded[i], row)


@each_target
def test_functions_are_accurate_and_keep_nan(build, target):
    # function, float64 meaning, absolute and relative error allowed (float32 has 6e-8)
    cases = [
        (Vector.exp, torch.exp, 1e-44, 1.2e-7),
        (Vector.sigmoid, torch.sigmoid, 1e-38, 3e-7),
        (Vector.silu, F.silu, 1e-36, 3e-7),
        (Vector.tanh, torch.tanh, 4e-7, 0.0),
        (Vector.erf, torch.erf, 5e-7, 0.0),
        (Vector.gelu, F.gelu, 1e-7, 3e-7),
        (Vector.gelu_tanh, lambda x: F.gelu(x, approximate="tanh"), 1e-6, 3e-7),
        (Vector.relu, torch.relu, 0.0, 0.0),
        (Vector.sqrt, torch.sqrt, 0.0, 6e-8),
        (lambda v, x: v.clamp(x, -7.0, 2.0), lambda x: x.clamp(-7, 2), 0.0, 0.0),
    ]
    x = torch.cat([torch.linspace(-87, 88, 20000), torch.randn(10000), torch.randn(2000) * 1e-4])
    x = torch.cat([x, torch.tensor([0.0, -0.0, float("nan"), -200.0])])
    x = F.pad(x, (0, -len(x) % 16))
    y = torch.empty(len(cases), len(x))
    build(target, elementwise(target, [c[0] for c in cases]))(x, y)
    for row, (_, meaning, absolute, relative) in zip(y, cases, strict=True):
        expected = meaning(x.double())
        assert torch.equal(row.isnan(), expected.isnan()), meaning
        excess = (row - expected).abs() - relative * expected.abs()
        assert excess.nan_to_num(0.0).max() <= absolute, meaning


@each_target
def test_exp_has_exact_ends(build, target):
    x = torch.tensor([float("-inf"), -1000.0, float("inf"), 89.0]).repeat(4)
    y = torch.empty(1, 16)
    build(target, elementwise(target, [Vector.exp]))(x, y)
    assert y[0, :4].tolist() == [0.0, 0.0, float("inf"), float("inf")]
