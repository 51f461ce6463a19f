"""Products with weights of few bits against the reference, on every target, with any routing."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from moec.codegen.build import assembly
from moec.codegen.cpu.gemm.pack import pack_bias
from moec.codegen.cpu.llvm import integer_text
from moec.codegen.cpu.quantised.grouped import quantised_linear
from moec.codegen.cpu.quantised.layout import QuantisedLayout, pack_codes, pack_scales
from moec.codegen.cpu.quantised.round_rows import round_rows as rounding_kernel
from moec.codegen.cpu.vector import Vector
from moec.codegen.specs.products import QuantisedSpec
from moec.ir.aten import TORCH_DTYPES
from moec.ir.formats.integer import MOST_SUMMED, Quantised, dequantise, quantise, round_rows
from moec.ir.formats.notation import Format, parse
from moec.runtime.dtypes import NUMPY
from moec.target.cpu import TARGETS, missing
from tests.codegen.cpu.gemm.test_grouped import routing

RUNNABLE = [
    t for t in TARGETS.values() if not missing(t) and t.name != "amx"
]  # gemm/test_amx_tile.py
BEST = RUNNABLE[-1]
FORMATS = ("int8", "int8:32:asymmetric", "int4:asymmetric", "int4:32", "int4:64", "mxfp4")
FORMATS += ("int3:32", "int3:64:asymmetric", "int2:32:asymmetric", "int2:64")
FORMATS += ("int6", "int5:asymmetric")
OF_CHECKPOINTS = {
    str(format): format
    for format in (
        Format("int4", 32, True, scales="f16", float_zeros=True),
        Format("int8", 32, True, scales="f16", float_zeros=True),
        Format("int2", 16, True, scales="f16", float_zeros=True),
        Format("int5", 0, True, scales="f32", float_zeros=True),
        Format("int5", 32, True, 16, "f16", float_zeros=True),
        Format("int6", 16, scales="f16"),
    )
}
"""Formats that --quant does not write."""
# Targets differ in how they multiply bytes and look up e2m1; what is around that is the same.
BUILT = [
    *((BEST, f) for f in (*FORMATS, *OF_CHECKPOINTS)),
    *((t, f) for t in RUNNABLE[:-1] for f in ("int8", "mxfp4", "int3:32", "int6:16:f16")),
    *((t, "int4:32:float_zeros:f16") for t in RUNNABLE[:-1]),
]
BUILT += [(BEST, "int8:asymmetric:rows16"), (BEST, "mxfp4:rows16"), (RUNNABLE[1], "int4:32:rows16")]
# Integers are exact; what is left are float32 products with scales, and the sum over blocks:
# some dozen roundings of terms no greater than the greatest result's. In 16 bits x times a scale
# comes out halfway between two integers so often that targets which fuse it with the rounding take
# the other one here and there: a 32639th of the greatest input then.
CLOSE = {8: 4e-6, 16: 4e-6 + 1 / 32639}


def tensor(array) -> torch.Tensor:
    if array.dtype == NUMPY["bf16"]:
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def read(text: str) -> Format:
    return OF_CHECKPOINTS.get(text) or parse(text)


def stored(format: Format, weight: torch.Tensor) -> Quantised:
    q = quantise(format, weight)
    if format.scales == "bf16":
        return q
    dtype = TORCH_DTYPES[format.scales]
    zeros = (q.zeros.float() * q.scales).to(dtype) if format.float_zeros else q.zeros
    return Quantised(q.codes, q.scales.to(dtype), zeros)


class Linear:
    """A quantised linear layer of random weights, as kernels and as its reference."""

    def __init__(self, build, target, text, n, k, experts, *, gated=False, bias=False, **how):
        format = read(text)
        spec = QuantisedSpec(
            n, k, "float32", "float32", groups=experts, gated=gated, bias=bias, format=format
        )
        layout, v = QuantisedLayout(spec, target), Vector(target)
        codes = [stored(format, torch.randn(experts, n, k) * 0.1) for _ in range(1 + gated)]
        self.weights = [dequantise(format.kind, q.codes, q.scales, q.zeros) for q in codes]
        self.biases = [torch.randn(experts, n) for _ in codes] if bias else []
        planes = layout.row_codes.planes
        self.words, self.sums, self.blocks = planes * layout.x_words, planes, layout.blocks
        self.columns, self.row_bits = n, format.row_bits
        self.layout, self.gated, self.top_k = layout, gated, how.get("top_k", 0)
        self.packed = [tensor(pack_codes(layout, *(q.codes for q in codes)))]
        self.packed += [tensor(pack_scales(layout, *(q.scales for q in codes)))]
        if format.asymmetric:
            self.packed += [tensor(pack_scales(layout, *(q.zeros for q in codes)))]
        if bias:
            self.packed += [tensor(pack_bias(layout, *self.biases))]
        join = (lambda g, u: v.silu(g) * u) if gated else None
        rounding = rounding_kernel(target, k, layout.blocks, "float32", form=layout.row_codes)
        self.rounding = build(target, rounding)
        self.kernel = build(target, quantised_linear(target, spec, epilogue=join, **how))

    def __call__(self, x, order, ends, scale=None):
        rows = len(x)
        codes = torch.full((rows, self.words), -1, dtype=torch.int32)
        scales = torch.full((rows, self.blocks), float("nan"))
        sums = torch.full((rows, self.sums * self.blocks), -1, dtype=torch.int32)
        self.rounding(x, codes, scales, sums)
        y = torch.full((len(order) if self.top_k else rows, self.columns), float("nan"))
        first = [order] if self.top_k else []
        last = [] if scale is None else [scale]
        self.kernel(codes, scales, sums, *first, ends, *self.packed, *last, y)
        return y

    def means(self, x, order, ends, scale=None):
        rows = round_rows(x, self.blocks, self.row_bits)
        if self.top_k:
            rows = rows[order.long() // self.top_k]
        result = torch.zeros(len(rows), self.columns, dtype=torch.float64)
        start = 0
        for e, end in enumerate(ends.tolist()):
            parts = [rows[start:end].double() @ w[e].double().T for w in self.weights]
            if scale is not None:
                parts = [p * scale.flatten()[order.long()][start:end, None] for p in parts]
            if self.biases:
                parts = [p + b[e] for p, b in zip(parts, self.biases, strict=True)]
            result[start:end] = F.silu(parts[0]) * parts[1] if self.gated else parts[0]
            start = end
        return result


def check(y, expected, row_bits=8):
    assert torch.equal(y.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    if finite.any():
        limit = CLOSE[row_bits] * (1 + expected[finite].abs().max())
        assert (y.double() - expected)[finite].abs().max() <= limit


@pytest.mark.parametrize(("target", "text"), BUILT, ids=lambda v: getattr(v, "name", v))
def test_gathered_gate_and_up(build, target, text):
    """With bias, a weight on the input's side, columns behind the last whole vector, rows of
    zeros, of NaN and of an infinity, and every number of rows beside a whole tile."""
    linear = Linear(
        build, target, text, 37, 128, 3, gated=True, bias=True, top_k=2, scale_dtype="float32"
    )
    for t in (0, 1, 33):
        x, scale = torch.randn(t, 128), torch.rand(t, 2)
        if t > 3:
            x[0], x[1], x[2, 5] = 0, float("nan"), float("inf")
        order, ends = routing(torch.randint(0, 4, (t, 2)), 3)
        y, expected = linear(x, order, ends, scale), linear.means(x, order, ends, scale)
        check(y, expected, read(text).row_bits)


@pytest.mark.parametrize(("n", "k"), [(20, 6), (70, 133), (16, 64), (1, 1)])
@pytest.mark.parametrize(
    "text",
    ["int8", "int6", "int5:float_zeros:f32", "int4:asymmetric", "int3:asymmetric:rows16", "int2"],
)
def test_widths_that_fill_no_word_and_no_vector(build, text, n, k):
    linear = Linear(build, BEST, text, n, k, 2)
    ends = torch.tensor([4, 9], dtype=torch.int32)
    x = torch.randn(11, k)
    check(linear(x, None, ends), linear.means(x, None, ends), read(text).row_bits)


@cache
def small(build):
    return Linear(build, BEST, "int4:32", 20, 32, 6, top_k=2)


@settings(max_examples=40)
@given(data=st.data(), tokens=st.integers(0, 20))
def test_any_routing(build, data, tokens):
    """Empty experts, all on one, none owned (id 6)."""
    ids = data.draw(st.sampled_from([st.integers(0, 6), st.just(3), st.just(6)]))
    flat = data.draw(st.lists(ids, min_size=tokens * 2, max_size=tokens * 2))
    order, ends = routing(torch.tensor(flat, dtype=torch.int64).reshape(tokens, 2), 6)
    x = torch.randn(tokens, 32)
    check(small(build)(x, order, ends), small(build).means(x, order, ends))


@pytest.mark.parametrize("text", ["int4:64", "int4:64:rows16", "int6:16:f16"])
def test_rows_do_not_depend_on_the_rows_beside_them(build, text):
    """Bit for bit: the sums of a row are made in one order, in any tile, by any thread."""
    linear = Linear(build, BEST, text, 48, 128, 1)
    x = torch.randn(13, 128)
    full = linear(x, None, torch.tensor([13], dtype=torch.int32))
    for row in range(13):
        one = linear(x[row : row + 1], None, torch.tensor([1], dtype=torch.int32))
        assert torch.equal(one[0], full[row])


@pytest.mark.parametrize(
    ("kind", "greatest"), [(f"int{bits}", 2**bits - 1) for bits in (8, 6, 5, 4, 3, 2)]
)
def test_the_greatest_sums_of_one_scale(build, kind, greatest):
    """Rows of 16 bits whose lower bytes are all -128, and weights as far as can be above their
    zeros: int32 holds both sums of a row as long as any may be."""
    format = parse(f"{kind}:asymmetric:rows16")
    spec = QuantisedSpec(16, MOST_SUMMED, "float32", "float32", format=format)
    layout, ends = QuantisedLayout(spec, BEST), torch.tensor([1], dtype=torch.int32)
    greatest = 2**format.bits - 1
    kernel = build(BEST, quantised_linear(BEST, spec))
    codes = torch.full((1, 16, MOST_SUMMED), greatest, dtype=torch.uint8)
    scales, zeros = torch.ones(1, 16, 1, dtype=torch.bfloat16), torch.zeros(1, 16, 1).byte()
    packed = [pack_codes(layout, codes), pack_scales(layout, scales), pack_scales(layout, zeros)]
    planes = torch.tensor([[127], [-128]], dtype=torch.int8).repeat(1, MOST_SUMMED)
    x, y = planes.view(torch.int32).reshape(1, -1), torch.empty(1, 16)
    sums = planes.sum(1, dtype=torch.int32)[None]
    kernel(x, torch.ones(1, 1), sums, ends, *map(tensor, packed), y)
    assert torch.equal(y, torch.full((1, 16), float(greatest * (127 * 256 - 128) * MOST_SUMMED)))


@pytest.mark.parametrize("text", ["int8", "int8:32:asymmetric", "int8:32:float_zeros:f16", "mxfp4"])
def test_products_of_signed_bytes_alone(build, monkeypatch, text):
    """What Arm's dotprod multiplies, in instructions that run here: codes must be lessened."""
    target = replace(TARGETS["generic"], name=f"signed {text}", features=("dotprod",))
    assert target.int8_signed
    emulated = integer_text.dot4(TARGETS["generic"]).replace("%xh = lshr ", "%xh = ashr ")
    low = "%xs = shl <8 x i16> %x, splat (i16 8)\n  %xl = ashr <8 x i16> %xs, splat (i16 8)"
    emulated = re.sub("%xl = and .*", low, emulated)
    monkeypatch.setattr(integer_text, "dot4", lambda _: emulated)
    linear = Linear(build, target, text, 20, 64, 2)
    ends = torch.tensor([4, 9], dtype=torch.int32)
    x = torch.randn(11, 64)
    check(linear(x, None, ends), linear.means(x, None, ends))


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("llvm:-mcpu=x86-64-v3", r"vpmaddwd\t.*%ymm"),
        ("llvm:-mcpu=alderlake", r"{vex}\tvpdpbusd\t.*%ymm"),
        ("llvm:-mcpu=skylake-avx512", r"vpmaddwd\t.*%zmm"),
        ("llvm:-mcpu=znver4", r"vpdpbusd\t.*%zmm"),
        ("llvm:-mcpu=generic,-mtriple=aarch64-linux-gnu", r"smull2\t"),
        ("neon-dotprod", r"\tsdot\t"),
        ("llvm:-mcpu=neoverse-v1,-mtriple=aarch64-linux-gnu", r"\tusdot\t"),
    ],
)
def test_code_for_other_targets(name, instruction):
    """It compiles, and multiplies integers with what the target has for it."""
    from moec.target.cpu import parse as target_of

    target = target_of(name)
    code = {}
    for text in ("int8", "mxfp4"):
        spec = QuantisedSpec(4, 64, "float32", groups=2, format=parse(text))
        code[text] = assembly(quantised_linear(target, spec), target)
        assert re.search(instruction, code[text])
    assert "vpmaddubsw" not in code["int8"]
    assert ("vpmaddubsw" in code["mxfp4"]) == ("vpmaddwd" in instruction)
