"""Products on tile registers: every number of rows, gathered or not, tails of columns.

Tolerances: a sum of K products of bf16 in float32, in any order, has an error of less than (K + 2)
half units in the last place of the sum of magnitudes; then the result is rounded. The unit flushes
subnormal numbers to 0, which does not affect these sums.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from moec.codegen.build import assembly
from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.linear import gathered_linear, grouped_linear, linear, linears
from moec.codegen.cpu.gemm.pack import pack, pack_bias
from moec.codegen.cpu.vector import Vector
from moec.codegen.specs.products import LinearSpec
from moec.target.cpu import TARGETS, missing, parse

AMX = TARGETS["amx"]
on_amx = pytest.mark.skipif(bool(missing(AMX)), reason="needs a CPU with AMX")


def packed(spec: LinearSpec, *weights, biases=()):
    layout = Layout(spec, AMX)
    assert layout.amx
    results = [pack(layout, *weights)] + ([pack_bias(layout, *biases)] if biases else [])
    return [torch.from_numpy(p) for p in results]


def near(y, x, w, bias=0.0):
    exact = x.double() @ w.double().mT + bias
    size = x.double().abs() @ w.double().abs().mT + abs(bias)
    error = (x.shape[1] + 2) * 2.0**-24 * size
    rounding = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[y.dtype]
    return bool(((y.double() - exact).abs() <= error + rounding * (exact.abs() + error)).all())


def test_only_rows_of_whole_registers_go_this_way():
    assert Layout(LinearSpec(5, 64, "bfloat16"), AMX).amx
    assert not Layout(LinearSpec(5, 48, "bfloat16"), AMX).amx
    assert not Layout(LinearSpec(5, 64, "float32"), AMX).amx
    assert not Layout(LinearSpec(5, 64, "bfloat16"), TARGETS["avx512-bf16"]).amx
    assert parse("llvm:-mcpu=sapphirerapids").bf16_tiles


def test_it_compiles_for_amx_everywhere():
    kernel = grouped_linear(AMX, LinearSpec(96, 64, "bfloat16", groups=2))
    assert "tdpbf16ps" in assembly(kernel, AMX)


@on_amx
@pytest.mark.parametrize(
    ("n", "k", "bias", "out"), [(5, 32, True, "float32"), (200, 96, False, "")]
)
def test_any_number_of_rows(build, n, k, bias, out):
    """None, less than a register, several registers, several panels; the last ones not full."""
    spec = LinearSpec(n, k, "bfloat16", out, bias=bias)
    weight, biases = torch.randn(n, k).bfloat16(), (torch.randn(1, n),) * bias
    arguments = packed(spec, weight, biases=biases)
    kernel = build(AMX, linear(AMX, spec))
    for t in (0, 1, 15, 16, 17, 64, 65, 150):
        x = torch.randn(t, k).bfloat16()
        y = torch.full((t, n), float("nan")).to(torch.float32 if out else torch.bfloat16)
        kernel(x, *arguments, y)
        assert near(y, x, weight, biases[0][0].double() if bias else 0.0)


@on_amx
def test_rows_past_the_cache_go_in_chunks(build):
    """The smallest cache: 64 rows at a time, several products in one kernel."""
    small = replace(AMX, l2=1)
    specs = (LinearSpec(70, 64, "bfloat16"), LinearSpec(16, 64, "bfloat16", "float32"))
    weights = [torch.randn(s.n, 64).bfloat16() for s in specs]
    arguments = [packed(s, w)[0] for s, w in zip(specs, weights, strict=True)]
    x = torch.randn(200, 64).bfloat16()
    results = [torch.empty(200, 70).bfloat16(), torch.empty(200, 16)]
    build(small, linears(small, specs))(x, *arguments, *results)
    assert all(near(y, x, w) for y, w in zip(results, weights, strict=True))


@on_amx
@pytest.mark.parametrize("num_experts", [3, 64])
def test_gathered_gate_and_up(build, num_experts):
    """64 experts of 5 tiles go four tiles at a time; some expert has many rows, some none."""
    h, d, k, v = 150 if num_experts == 64 else 40, 64, 2, Vector(AMX)
    spec = LinearSpec(h, d, "bfloat16", "float32", groups=num_experts, gated=True, bias=True)
    weights = [(torch.randn(num_experts, h, d) * 0.1).bfloat16() for _ in range(2)]
    biases = [torch.randn(num_experts, h) for _ in range(2)]
    kernel = gathered_linear(AMX, spec, k, lambda g, u: v.silu(g) * u, scale_dtype="float32")
    function, arguments = build(AMX, kernel), packed(spec, *weights, biases=biases)
    for t in (0, 1, 90):
        x, scale = torch.randn(t, d).bfloat16(), torch.rand(t, k)
        owners = torch.randint(0, num_experts + 1, (t, k))  # the last one is nobody
        owners[:, 0] = 1
        order = owners.flatten().sort(stable=True).indices.int()
        counts = torch.bincount(owners.flatten(), minlength=num_experts + 1)
        ends = counts.cumsum(0)[:num_experts].int()
        y = torch.full((t * k, h), float("nan"))
        function(x, order, ends, *arguments, scale, y)
        expected = torch.zeros(t * k, h, dtype=torch.float64)
        for r, choice in enumerate(order.tolist()):
            e = int(owners.flatten()[choice])
            if e < num_experts:
                row = x[choice // k].double() * scale.flatten()[choice].double()
                gate, up = (
                    w[e].double() @ row + b[e] for w, b in zip(weights, biases, strict=True)
                )
                expected[r] = F.silu(gate) * up
        # Products of order 1, of two sums of 64: 4e-6 in test_grouped, for sums of some dozens.
        assert ((y - expected).abs() <= 1e-5 * (1 + expected.abs())).all()


@on_amx
def test_results_depend_on_no_other_row(build):
    """Alone, beside others, gathered or not: the same bits."""
    spec = LinearSpec(80, 64, "bfloat16", groups=1)
    arguments = packed(spec, torch.randn(1, 80, 64).bfloat16())
    x = torch.randn(70, 64).bfloat16()
    together, alone, moved = (torch.empty(n, 80).bfloat16() for n in (70, 1, 70))
    kernel = build(AMX, linear(AMX, spec))
    kernel(x, *arguments, together)
    for i in (0, 15, 16, 63, 64, 69):
        kernel(x[i : i + 1].clone(), *arguments, alone)
        assert torch.equal(together[i : i + 1], alone)
    order = torch.randperm(70).int()
    ends = torch.tensor([70], dtype=torch.int32)
    build(AMX, gathered_linear(AMX, spec, 1))(x, order, ends, *arguments, moved)
    assert torch.equal(moved, together[order.long()])


@on_amx
def test_nan_and_infinity_stay_in_their_row(build):
    spec = LinearSpec(17, 32, "bfloat16")
    arguments = packed(spec, torch.randn(17, 32).bfloat16())
    x = torch.randn(20, 32).bfloat16()
    x[2, 8], x[18, 0] = float("nan"), float("inf")
    y = torch.empty(20, 17).bfloat16()
    build(AMX, linear(AMX, spec))(x, *arguments, y)
    assert y[2].isnan().all()
    assert not y[18].isfinite().any()
    rest = [i for i in range(20) if i not in (2, 18)]
    assert y[rest].isfinite().all()


GUARDED = """
import ctypes, mmap, torch, tvm
from moec.codegen.build import compile_kernels
from moec.codegen.cpu.gemm.layout import Layout, LinearSpec
from moec.codegen.cpu.gemm.linear import linear
from moec.codegen.cpu.gemm.pack import pack
from moec.target.cpu import TARGETS, require
amx, spec = TARGETS["amx"], LinearSpec(40, 64, "bfloat16")
require(amx)
made = compile_kernels(linear(amx, spec, name="f"), target=amx)
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + page), page, 0) == 0
w = torch.from_numpy(pack(Layout(spec, amx), torch.randn(40, 64).bfloat16()))
for rows in (1, 17, 20):
    size = rows * 64
    x = torch.frombuffer(memory, dtype=torch.bfloat16, count=size, offset=page - 2 * size)
    y = torch.empty(rows, 40).bfloat16()
    made["f"](*map(tvm.runtime.from_dlpack, (x.view(rows, 64), w, y)))
print("read nothing behind x")
"""


@on_amx
def test_nothing_behind_the_last_row_is_read():
    """Memory that ends with x: a register of rows that reached beyond would end the process."""
    run = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True)
    assert run.stdout == "read nothing behind x\n", run.stderr
