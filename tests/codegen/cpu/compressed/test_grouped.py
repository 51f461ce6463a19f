"""Products with compressed weights against the reference, on every target, with any routing."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.codegen.build import assembly
from moec.codegen.cpu.compressed import weights as compressed_weights
from moec.codegen.cpu.compressed.grouped import MANY, compressed_linear
from moec.codegen.cpu.compressed.weights import table
from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.pack import pack_bias
from moec.codegen.cpu.quantised.layout import PAIRS
from moec.codegen.cpu.quantised.round_rows import round_rows as rounding_kernel
from moec.codegen.cpu.vector import Vector
from moec.codegen.specs.products import CompressedSpec
from moec.ir.formats.compressed import MOST_WIDTH, compress, decompress
from moec.ir.formats.ternary import bytes_of_counts, codes_of, grid_of
from moec.target.cpu import TARGETS, missing, parse
from tests.codegen.cpu.gemm.test_grouped import routing
from tests.codegen.cpu.quantised.test_grouped import Linear as Rounded
from tests.codegen.cpu.quantised.test_grouped import check

RUNNABLE = [t for t in TARGETS.values() if not missing(t) and t.name != "avx2-vnni"]
BEST = RUNNABLE[-1]


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.numel() else torch.zeros(1, dtype=tensor.dtype)[:0]


class Linear(Rounded):
    """A compressed linear layer of random weights, as kernels and as its reference."""

    def __init__(self, build, target, n, k, experts, *, gated=False, bias=False, **how):
        spec = CompressedSpec(n, k, "f", "float32", groups=experts, gated=gated, bias=bias)
        v, counts = Vector(target), []
        self.top_k, self.weights = how.get("top_k", 0), []
        self.packed = [aligned(torch.from_numpy(table(target)))]
        for _ in range(1 + gated):
            weight = torch.randn(experts, n, k)
            grid = grid_of(weight)
            parts = compress(codes_of(weight, grid), grid)
            self.weights.append(decompress(parts, k))
            self.packed += map(aligned, parts)
            counts.append(bytes_of_counts(parts[1].shape))
        spec = replace(spec, bytes_of_counts=tuple(counts))
        self.words, self.sums, self.blocks, self.columns = PAIRS.words(k), 1, 1, n
        self.gated, self.row_bits = gated, 16
        self.biases = [torch.randn(experts, n) for _ in self.weights] if bias else []
        if bias:
            self.packed.append(torch.from_numpy(pack_bias(Layout(spec, target), *self.biases)))
        join = (lambda g, u: v.silu(g) * u) if gated else None
        self.rounding = build(target, rounding_kernel(target, k, 1, "float32", form=PAIRS))
        self.kernel = build(target, compressed_linear(target, spec, epilogue=join, **how))


@pytest.mark.parametrize("target", RUNNABLE, ids=lambda t: t.name)
def test_gathered_gate_and_up(build, target):
    """With bias, a weight on the input's side, columns behind the last whole vector, rows of
    zeros, of NaN and of an infinity, and every number of rows beside a whole tile."""
    linear = Linear(build, target, 37, 90, 3, gated=True, bias=True, top_k=2, scale_dtype="float32")
    for t in (0, 1, 4 * MANY):
        x, scale = torch.randn(t, 90), torch.rand(t, 2)
        if t > 3:
            x[0], x[1], x[2, 5] = 0, float("nan"), float("inf")
        order, ends = routing(torch.randint(0, 4, (t, 2)), 3)
        check(linear(x, order, ends, scale), linear.means(x, order, ends, scale), 16)


@pytest.mark.parametrize(("n", "k"), [(70, 133), (1, 1)])
def test_widths_that_fill_no_word_and_no_vector(build, n, k):
    linear = Linear(build, BEST, n, k, 2)
    ends = torch.tensor([4, 9], dtype=torch.int32)
    x = torch.randn(11, k)
    check(linear(x, None, ends), linear.means(x, None, ends), 16)


@cache
def small(build):
    return Linear(build, BEST, 20, 32, 6, top_k=2)


@settings(max_examples=40)
@given(data=st.data(), tokens=st.integers(0, 20))
def test_any_routing(build, data, tokens):
    """Empty experts, all on one, none owned (id 6)."""
    ids = data.draw(st.sampled_from([st.integers(0, 6), st.just(3), st.just(6)]))
    flat = data.draw(st.lists(ids, min_size=tokens * 2, max_size=tokens * 2))
    order, ends = routing(torch.tensor(flat, dtype=torch.int64).reshape(tokens, 2), 6)
    x = torch.randn(tokens, 32)
    linear = small(build)
    check(linear(x, order, ends), linear.means(x, order, ends), 16)


@pytest.mark.parametrize("tokens", [2, 9, 61])
def test_a_row_means_the_same_beside_any_others(build, tokens):
    """Whether weights are decoded for few rows, or once for many, more than a chunk of 96 even."""
    linear, x = small(build), torch.randn(tokens, 32)
    order, ends = routing(torch.full((tokens, 2), 3), 6)
    full = linear(x, order, ends)
    order, ends = routing(torch.full((1, 2), 3), 6)
    for t in range(tokens):
        assert torch.equal(linear(x[t : t + 1].clone(), order, ends), full[2 * t : 2 * t + 2])


@pytest.mark.parametrize(
    "target", [t for t in RUNNABLE if t.vector_lanes < 16], ids=lambda t: t.name
)
def test_masks_and_signs_give_the_same_bits(build, target, monkeypatch):
    """Few rows and many, of weights that are mostly not 0."""
    results = []
    for signs in (True, False):
        monkeypatch.setattr(compressed_weights, "signed", lambda target, signs=signs: signs)
        torch.manual_seed(0)
        linear = Linear(build, target, 37, 90, 3)
        rows = torch.randn(6 + MANY, 90)
        results.append(linear(rows, None, torch.tensor([5, 6, 6 + MANY], dtype=torch.int32)))
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def test_the_greatest_sums_fit(build):
    """All inputs and weights greatest, in one codeword a pair: the widest row that is taken."""

    spec = CompressedSpec(1, MOST_WIDTH, "f", "float32", bytes_of_counts=(2,))
    grid = torch.tensor([[[-1.0, 1.0]]]).bfloat16()
    parts = compress(torch.full((1, 1, MOST_WIDTH), 2, dtype=torch.uint8), grid)
    codes = torch.zeros(1, PAIRS.words(MOST_WIDTH), dtype=torch.int32)
    codes.view(torch.int16)[:, :MOST_WIDTH] = 32767
    y, ends = torch.zeros(1, 1), torch.ones(1, dtype=torch.int32)
    entries = aligned(torch.from_numpy(table(BEST)))
    kernel = build(BEST, compressed_linear(BEST, spec))
    one = torch.ones(1, 1)
    kernel(codes, one, one.int(), ends, entries, *map(aligned, parts), y)
    assert float(y) == pytest.approx(32767 * MOST_WIDTH, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "instruction", "walk", "rows"),
    [
        # Bytes of signs become words; masks tell in the bits from 60 on how far they reach. Sixteen
        # registers hold the sums of one row or of two.
        ("avx2", r"vpmaddwd\t.*%ymm", "vpmovsxbw", 2),
        ("llvm:-mcpu=skylake-avx512", r"vpmaddwd\t.*%zmm", "$60", 4),
        ("avx512-bf16", r"vpdpwssd\t.*%zmm", "$60", 4),
    ],
)
def test_sums_of_pairs_are_one_instruction(name, instruction, walk, rows):
    target = parse(name)
    kernel = compressed_linear(target, CompressedSpec(64, 128, "f", "float32"))
    loops = re.split(r"\n\.LBB", assembly(kernel, target))
    walks = [code for code in loops if walk in code and "\tmovzwl\t" in code]
    assert sum(bool(re.search(instruction, code)) for code in walks) >= rows
    assert not any("vshufps" in code for code in walks)
