"""Dense products against float64: every type and target, tails of N, K and T, K in blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.linear import MANY, linear, linears
from moec.codegen.cpu.gemm.pack import pack, pack_bias
from moec.codegen.cpu.vector import Vector
from moec.codegen.specs.products import LinearSpec
from moec.target.cpu import TARGETS, CpuTarget, missing
from tests.codegen.cpu.attention.test_attention import same_with_any_threads

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ELSEWHERE = ("amx", "avx2-vnni")  # test_amx_tile.py, quantised/test_grouped.py
RUNNABLE = [t for t in TARGETS.values() if not missing(t) and t.name not in ELSEWHERE]
BEST = RUNNABLE[-1]
each_target = pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
# What kernels read as it lies, and do not widen first.
STREAMED = [
    pytest.param(target, dtype, id=f"{target.name}-{dtype}")
    for target in RUNNABLE
    for dtype in DTYPES
    if not Layout(LinearSpec(64, 64, dtype), target).widened
]


def operands(target: CpuTarget, spec: LinearSpec):
    """Weights and biases as given, and the packed arguments of a kernel."""
    layout, parts = Layout(spec, target), 2 if spec.gated else 1
    dtype = DTYPES[spec.dtype]
    weights = [torch.randn(spec.groups, spec.n, spec.k).to(dtype) for _ in range(parts)]
    biases = [torch.randn(spec.groups, spec.n) for _ in range(parts)] if spec.bias else []
    packed = [torch.from_numpy(pack(layout, *weights))]
    packed += [torch.from_numpy(pack_bias(layout, *biases))] if biases else []
    return weights, biases, packed


def sums(x, weights, biases):
    """Each product in float64, and how far float32 sums may be from it.

    A sum of K products in any order errs by less than (K + 2) half units in the last place of
    the sum of magnitudes; fused or not, in pairs or not.
    """
    results = []
    for i, w in enumerate(weights):
        exact = x.double() @ w.double().T
        size = x.double().abs() @ w.double().abs().T
        if biases:
            exact, size = exact + biases[i].double(), size + biases[i].double().abs()
        results.append((exact, (x.shape[1] + 2) * 2.0**-24 * size))
    return results


def check(y, exact, error, rounding):
    allowed = error + rounding[y.dtype] * (exact.abs() + error)
    assert ((y.double() - exact).abs() <= allowed).all()


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(build, rounding, target, dtype):
    for n, k, bias, out in [(64, 32, False, ""), (71, 33, True, ""), (5, 7, True, "float32")]:
        spec = LinearSpec(n, k, dtype, out, bias=bias)
        (weight,), biases, packed = operands(target, spec)
        kernel = build(target, linear(target, spec))
        for t in (0, 1, 5, 6, 8, 9, 13, 101):
            x = torch.randn(t, k).to(DTYPES[dtype])
            y = torch.full((t, n), float("nan"), dtype=DTYPES[spec.y_dtype])
            kernel(x, *packed, y)
            ((exact, error),) = sums(x, weight, [b[0] for b in biases])
            check(y, exact, error, rounding)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_side_by_side(build, rounding, target, dtype):
    """Each product has the same bits as alone, whatever the other products are."""
    specs = (
        LinearSpec(64, 33, dtype),
        LinearSpec(5, 33, dtype, "float32", bias=True),
        LinearSpec(71, 33, dtype, bias=True),
    )
    private = [operands(target, spec)[2] for spec in specs]
    together = build(target, linears(target, specs))
    alone = [build(target, linear(target, spec)) for spec in specs]
    for t in (0, 1, 13, 101):
        x = torch.randn(t, 33).to(DTYPES[dtype])
        results = [torch.full((t, s.n), float("nan"), dtype=DTYPES[s.y_dtype]) for s in specs]
        expected = [torch.empty_like(y) for y in results]
        together(x, *(part for packed in private for part in packed), *results)
        for kernel, packed, y in zip(alone, private, expected, strict=True):
            kernel(x, *packed, y)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_products_that_cannot_stand_side_by_side():
    plain = LinearSpec(8, 8, "float32")
    with pytest.raises(ValueError, match="of rows of other widths or dtypes"):
        linears(BEST, (plain, LinearSpec(8, 9, "float32")))
    with pytest.raises(ValueError, match="must be dense, each with one matrix"):
        linears(BEST, (plain, LinearSpec(8, 8, "float32", gated=True)))


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_meet_several_tiles_at_once(build, target, dtype):
    """To the bit what each row is alone: K in blocks or not, rows in one chunk or two, products
    whose tiles come to an end in the midst of several."""
    specs = [LinearSpec(n, 301, dtype, "float32", bias=True) for n in (304, 301, 40)]
    packed = [part for spec in specs for part in operands(target, spec)[2]]
    kernel = build(target, linears(target, tuple(specs)))
    x = torch.randn(MANY + 70, 301).to(DTYPES[dtype])
    results = [torch.full((len(x), spec.n), float("nan")) for spec in specs]
    kernel(x, *packed, *results)
    for i in (0, 5, 6, len(x) - 2, len(x) - 1):
        alone = [torch.empty(1, spec.n) for spec in specs]
        kernel(x[i : i + 1].clone(), *packed, *alone)
        assert all(torch.equal(y[i : i + 1], one) for y, one in zip(results, alone, strict=True))


@pytest.mark.parametrize(("target", "dtype"), STREAMED)
def test_k_in_blocks_adds_up(build, rounding, target, dtype):
    """The smallest cache makes blocks of 64 steps at most; the last one is shorter. Blocks of what
    is widened do not depend on the cache: the test above."""
    target = replace(target, l2=1)
    spec = LinearSpec(40, 301, dtype, bias=True)
    layout = Layout(spec, target)
    assert 48 < layout.depth_block <= 64
    assert layout.depth % layout.depth_block
    (weight,), biases, packed = operands(target, spec)
    kernel = build(target, linear(target, spec))
    for t in (1, 100):
        x, y = torch.randn(t, 301).to(DTYPES[dtype]), torch.empty(t, 40).to(DTYPES[dtype])
        kernel(x, *packed, y)
        ((exact, error),) = sums(x, weight, [b[0] for b in biases])
        check(y, exact, error, rounding)


@each_target
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gate_and_up(build, target, dtype):
    spec, v = LinearSpec(21, 24, dtype, "float32", gated=True, bias=True), Vector(target)
    weights, biases, packed = operands(target, spec)
    kernel = build(target, linear(target, spec, lambda gate, up: v.silu(gate) * up))
    x, y = torch.randn(7, 24).to(DTYPES[dtype]), torch.empty(7, 21)
    kernel(x, *packed, y)
    gate, up = sums(x, [w[0] for w in weights], [b[0] for b in biases])
    # silu has slopes up to 1.1 and itself 4e-7 (three roundings and exp); so has the product.
    error = 1.1 * gate[1] * up[0].abs() + F.silu(gate[0]).abs() * up[1] + 2 * gate[1] * up[1]
    exact = F.silu(gate[0]) * up[0]
    assert ((y.double() - exact).abs() <= error + 6e-7 * exact.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_depend_on_no_other_row(build, dtype):
    """Nor on the threads: each element is summed in one order, in blocks of 6 rows or alone."""
    spec = LinearSpec(80, 65, dtype)
    _, _, packed = operands(BEST, spec)
    kernel = build(BEST, linear(BEST, spec))
    x = torch.randn(20, 65).to(DTYPES[dtype])
    together, alone = torch.empty(20, 80).to(x.dtype), torch.empty(1, 80).to(x.dtype)
    kernel(x, *packed, together)
    for i in range(20):
        kernel(x[i : i + 1].clone(), *packed, alone)
        assert torch.equal(together[i : i + 1], alone)


SCRIPT = """
import os, torch, tvm
from moec.codegen.build import compile_kernels
from moec.codegen.cpu.gemm.linear import grouped_linear
from moec.codegen.cpu.gemm.layout import Layout, LinearSpec
from moec.codegen.cpu.gemm.pack import pack
from moec.target.cpu import host
torch.manual_seed(0)
spec = LinearSpec(300, 129, "float32", groups=3)
kernel = compile_kernels(grouped_linear(host(), spec, name="f"), target=host())
packed = pack(Layout(spec, host()), torch.randn(3, 300, 129))
x, y = torch.randn(50, 129), torch.empty(50, 300)
ends = torch.tensor([20, 20, 50], dtype=torch.int32)
kernel["f"](*map(tvm.runtime.from_dlpack, (x, ends, torch.from_numpy(packed), y)))
assert tvm.get_global_func("runtime.NumThreads")() == min(THREADS, os.cpu_count())
print(y.numpy().tobytes().hex())
"""


def test_results_do_not_depend_on_the_number_of_threads(warm, tmp_path, monkeypatch):
    same_with_any_threads(SCRIPT, warm, tmp_path, monkeypatch)


def test_nan_and_infinity_stay_in_their_row(build):
    spec = LinearSpec(17, 9, "bfloat16")
    _, _, packed = operands(BEST, spec)
    x = torch.randn(8, 9).bfloat16()
    x[2, 8], x[5, 0] = float("nan"), float("inf")
    y = torch.empty(8, 17).bfloat16()
    build(BEST, linear(BEST, spec))(x, *packed, y)
    assert y[2].isnan().all()
    assert not y[5].isfinite().any()
    assert y[[0, 1, 3, 4, 6, 7]].isfinite().all()


def test_a_kernel_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="has one group of weights, not 2"):
        linear(BEST, LinearSpec(8, 8, "float32", groups=2))
    with pytest.raises(ValueError, match="need an epilogue"):
        linear(BEST, LinearSpec(8, 8, "float32", gated=True))
