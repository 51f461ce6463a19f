"""Products with e4m3 weights and rows of floats against the reference, on every target."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional as F

from moec.codegen.build import assembly
from moec.codegen.cpu.gemm.pack import pack_bias
from moec.codegen.cpu.quantised.grouped import quantised_linear
from moec.codegen.cpu.quantised.layout import QuantisedLayout, mark_nan, pack_codes, pack_scales
from moec.codegen.cpu.vector import Vector
from moec.codegen.specs.products import QuantisedSpec
from moec.dtypes import LONG_NAMES
from moec.ir.formats.integer import Quantised, dequantise, quantise
from moec.ir.formats.notation import Format
from moec.target.cpu import TARGETS, missing
from tests.codegen.cpu.gemm.test_grouped import routing
from tests.codegen.cpu.quantised.test_grouped import tensor

# On the others code is that of avx2 or avx512-bf16, but for rows of bf16 on AMX.
RUNNABLE = [t for t in TARGETS.values() if not missing(t) and t.name not in ("avx2-vnni", "amx")]
TILES = [t for t in TARGETS.values() if t.bf16_tiles and not missing(t)]
# A target and the dtype of x choose the tile: float32 lanes, or dot products of bf16.
CASES = [(t, "f32") for t in RUNNABLE] + [(t, "bf16") for t in RUNNABLE + TILES]
CASES += [(RUNNABLE[-1], "f16")]
IDS = [f"{t.name}-{x}" for t, x in CASES]
# Products are exact in float32, or rounded once (scales of float32); a sum of K of them, in any
# order, is off by at most K * 2^-24 of the sum of their magnitudes, and far less as errors cancel.
UNIT = 2.0**-24
TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Product:
    """A product of e4m3 weights, as a kernel and as its reference in float64."""

    def __init__(self, build, target, x_dtype, format, stacks, *, biases=(), **how):
        experts, n, k = stacks[0].codes.shape
        gated = len(stacks) == 2
        spec = QuantisedSpec(
            n, k, LONG_NAMES[x_dtype], "float32", groups=experts, gated=gated,
            bias=bool(biases), format=format,
        )  # fmt: skip
        layout, v = QuantisedLayout(spec, target), Vector(target)
        scales = [mark_nan(q.scales, q.codes) for q in stacks]
        self.packed = [tensor(pack_codes(layout, *(q.codes for q in stacks)))]
        self.packed += [tensor(pack_scales(layout, *scales))]
        self.packed += [tensor(pack_bias(layout, *biases))] if biases else []
        self.weights = [dequantise("fp8", q.codes, q.scales).double() for q in stacks]
        self.biases, self.n, self.gated, self.top_k = biases, n, gated, how.get("top_k", 0)
        join = (lambda g, u: v.silu(g) * u) if gated else None
        self.kernel = build(target, quantised_linear(target, spec, epilogue=join, **how))

    def __call__(self, x, order, ends):
        y = torch.full((len(order) if self.top_k else len(x), self.n), float("nan"))
        self.kernel(x, *([order] if self.top_k else []), ends, *self.packed, y)
        return y

    def means(self, x, order, ends):
        rows = x.double()
        if self.top_k:
            rows = rows[order.long() // self.top_k]
        y = torch.zeros(len(rows), self.n, dtype=torch.float64)
        start = 0
        for e, end in enumerate(ends.tolist()):
            parts = [rows[start:end] @ w[e].T for w in self.weights]
            if self.biases:
                parts = [p + b[e] for p, b in zip(parts, self.biases, strict=True)]
            y[start:end] = F.silu(parts[0]) * parts[1] if self.gated else parts[0]
            start = end
        return y


def product(build, target, x, experts, n, k, *, block=0, scales="bf16", gated=False, **how):
    format = Format("fp8", block, scales=scales, row_bits=0)
    stacks = [quantise(format, torch.randn(experts, n, k) * 0.1) for _ in range(1 + gated)]
    stacks = [Quantised(q.codes, q.scales.to(TORCH[scales]), None) for q in stacks]
    return Product(build, target, x, format, stacks, **how)


def check(y, expected, k):
    assert torch.equal(y.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    if finite.any():
        limit = 4 * k**0.5 * UNIT * (1 + expected[finite].abs().max())
        assert (y.double() - expected)[finite].abs().max() <= limit


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(("target", "x"), CASES, ids=IDS)
def test_every_code_is_exact(build, target, x, rows):
    """At each place of a word, for few rows and for many, which widen weights elsewhere; a NaN
    makes its column NaN, as a product with 0 is one."""
    codes = torch.stack([(torch.arange(256) + 37 * k) % 256 for k in range(8)], 1).byte()
    format = Format("fp8", row_bits=0)
    finite = torch.where(codes & 0x7F == 0x7F, 0, codes)[None]
    scales = torch.full((1, 256, 1), -0.5, dtype=torch.bfloat16)
    ends = torch.tensor([rows], dtype=torch.int32)
    each = Product(build, target, x, format, [Quantised(finite, scales, None)])
    eye = torch.eye(8, dtype=TORCH[x])
    results = [each(part.clone(), None, ends) for part in eye.split(rows)]
    assert torch.equal(torch.cat(results).double().T, each.weights[0][0])
    each = Product(build, target, x, format, [Quantised(codes[None], scales, None)])
    nan = each(eye[:rows].clone(), None, ends).isnan()
    assert torch.equal(nan, (codes & 0x7F == 0x7F).any(1).expand(rows, 256))


@pytest.mark.parametrize("block", [0, 64])
@pytest.mark.parametrize(("target", "x"), CASES, ids=IDS)
def test_gathered_gate_and_up(build, target, x, block):
    """With bias, columns behind the last whole vector, an empty expert, rows of 0 and of NaN."""
    biases = [torch.randn(4, 37) for _ in range(2)]
    each = product(build, target, x, 4, 37, 128, block=block, gated=True, biases=biases, top_k=2)
    for t in (0, 1, 7, 33):
        rows = torch.randn(t, 128).to(TORCH[x])
        if t > 3:
            rows[0], rows[1] = 0, float("nan")
        order, ends = routing(torch.tensor([0, 1, 3, 4])[torch.randint(0, 4, (t, 2))], 4)
        check(each(rows, order, ends), each.means(rows, order, ends), 128)


@pytest.mark.parametrize(("n", "k"), [(20, 6), (70, 133), (1, 1), (3, 7)])
@pytest.mark.parametrize(("target", "x"), CASES, ids=IDS)
def test_widths_that_fill_no_word_and_no_vector(build, target, x, n, k):
    each = product(build, target, x, 2, n, k)
    for ends in ([4, 5], [9, 20]):
        rows, bounds = torch.randn(22, k).to(TORCH[x]), torch.tensor(ends, dtype=torch.int32)
        check(each(rows, None, bounds), each.means(rows, None, bounds), k)


@pytest.mark.parametrize(
    ("target", "x", "block"),
    [
        (RUNNABLE[-1], "f32", 128),
        *((t, "bf16", b) for t in (RUNNABLE[-1], *TILES) for b in (0, 128)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.parametrize("scales", ["f16", "f32"])
def test_scales_of_checkpoints(build, target, x, block, scales):
    """And blocks of K, of which the cache holds one at a time."""
    each = product(build, target, x, 1, 40, 20480, block=block, scales=scales)
    for count in (2, 13):
        rows, ends = torch.randn(count, 20480).to(TORCH[x]), torch.tensor([count]).int()
        check(each(rows, None, ends), each.means(rows, None, ends), 20480)


@pytest.mark.parametrize("block", [0, 128])
@pytest.mark.parametrize(("target", "x"), CASES, ids=IDS)
def test_rows_do_not_depend_on_the_rows_beside_them(build, target, x, block):
    """Bit for bit, whether weights are widened in registers or in a panel."""
    each = product(build, target, x, 1, 48, 640, block=block)
    rows = torch.randn(70, 640).to(TORCH[x])
    full = each(rows, None, torch.tensor([70], dtype=torch.int32))
    for count in (1, 2, 3, 13, 33):
        for first in range(0, 70 - count, count):
            part = slice(first, first + count)
            y = each(rows[part].clone(), None, torch.tensor([count], dtype=torch.int32))
            assert torch.equal(y, full[part])


@pytest.mark.parametrize(
    ("name", "x", "instruction"),
    [
        ("avx2", "float32", r"vcvtph2ps\t.*%ymm"),
        ("avx512", "bfloat16", r"vcvtph2ps\t.*%zmm"),
        ("avx512-bf16", "bfloat16", r"vdpbf16ps\t.*%zmm"),
        ("neon-dotprod", "float32", r"\tfcvtl\t"),
    ],
)
def test_code_for_other_targets(name, x, instruction):
    spec = QuantisedSpec(4, 64, x, "float32", groups=2, format=Format("fp8", row_bits=0))
    code = assembly(quantised_linear(TARGETS[name], spec), TARGETS[name])
    assert re.search(instruction, code)
