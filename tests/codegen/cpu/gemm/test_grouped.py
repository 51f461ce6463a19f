"""Products of each expert's rows: gathered or not, gated or not, scaled, with any routing."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from moec.codegen.cpu.gemm.layout import Layout
from moec.codegen.cpu.gemm.linear import gathered_linear, grouped_linear
from moec.codegen.cpu.gemm.pack import pack, pack_bias
from moec.codegen.cpu.gemm.tile import PARTIAL_ROWS
from moec.codegen.cpu.vector import Vector
from moec.codegen.specs.products import LinearSpec
from tests.codegen.cpu.gemm.test_linear import BEST, DTYPES, STREAMED, each_target

# The relative error of a result of order 1: float32 sums of some dozen products, then rounding.
CLOSE = {"float32": 4e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def routing(experts: torch.Tensor, num_experts: int):
    owners = experts.flatten()
    owners = torch.where((owners < 0) | (owners >= num_experts), num_experts, owners)
    counts = torch.bincount(owners, minlength=num_experts + 1)[:num_experts]
    return owners.sort(stable=True).indices.int(), counts.cumsum(0).int()


def expected(rows, ends, weights, biases, scale, join):
    """Expert by expert in float64; rows without an expert are 0."""
    result = torch.zeros(len(rows), weights[0].shape[1], dtype=torch.float64)
    start = 0
    for e, end in enumerate(ends.tolist()):
        x = rows[start:end].double() * scale[start:end].double()
        parts = [x @ w[e].double().T for w in weights]
        parts = [p + b[e].double() for p, b in zip(parts, biases, strict=True)] if biases else parts
        result[start:end] = join(*parts)
        start = end
    return result


def check(y, expected, dtype):
    error = (y.double() - expected).abs() / (1 + expected.abs())
    assert len(y) == 0 or error.nan_to_num(1e9).max() <= CLOSE[dtype]


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "h"), [(48, 40), (35, 33)])
def test_gathered_gate_and_up(build, target, dtype, d, h):
    """Bias and the weight of the input included: w multiplies x, not the bias."""
    num_experts, k, v = 5, 3, Vector(target)
    spec = LinearSpec(h, d, dtype, groups=num_experts, gated=True, bias=True)
    layout = Layout(spec, target)
    weights = [(torch.randn(num_experts, h, d) * 0.1).to(DTYPES[dtype]) for _ in range(2)]
    biases = [torch.randn(num_experts, h) for _ in range(2)]
    kernel = gathered_linear(target, spec, k, lambda g, u: v.silu(g) * u, scale_dtype="float32")
    function = build(target, kernel)
    packed = [torch.from_numpy(p) for p in (pack(layout, *weights), pack_bias(layout, *biases))]
    for t in (0, 1, 40):
        x, scale = torch.randn(t, d).to(DTYPES[dtype]), torch.rand(t, k)
        order, ends = routing(torch.randint(0, num_experts + 1, (t, k)), num_experts)
        y = torch.full((t * k, h), float("nan")).to(DTYPES[dtype])
        function(x, order, ends, *packed, scale, y)
        rows, scales = x[order.long() // k], scale.flatten()[order.long()].unsqueeze(1)
        join = lambda g, u: F.silu(g) * u  # noqa: E731
        check(y, expected(rows, ends, weights, biases, scales, join), dtype)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_down(build, target, dtype):
    num_experts, d, h = 4, 50, 33
    spec = LinearSpec(d, h, dtype, "float32", groups=num_experts, bias=True)
    layout = Layout(spec, target)
    weight = (torch.randn(num_experts, d, h) * 0.1).to(DTYPES[dtype])
    bias = torch.randn(num_experts, d)
    packed = [torch.from_numpy(p) for p in (pack(layout, weight), pack_bias(layout, bias))]
    function = build(target, grouped_linear(target, spec))
    for experts in (torch.randint(0, 5, (60, 1)), torch.full((20, 1), 2), torch.full((3, 1), 4)):
        _, ends = routing(experts, num_experts)
        x = torch.randn(len(experts), h).to(DTYPES[dtype])
        y = torch.full((len(experts), d), float("nan"))
        function(x, ends, *packed, y)
        ones = torch.ones(len(experts), 1)
        check(y, expected(x, ends, [weight], [bias], ones, lambda p: p), "float32")


ACTIVATIONS = {
    "swiglu": (lambda v, g, u: v.silu(g) * u, lambda g, u: F.silu(g) * u),
    "geglu": (lambda v, g, u: v.gelu(g) * u, lambda g, u: F.gelu(g) * u),
    "geglu-tanh": (
        lambda v, g, u: v.gelu_tanh(g) * u,
        lambda g, u: F.gelu(g, approximate="tanh") * u,
    ),
    "reglu": (lambda v, g, u: v.relu(g) * u, lambda g, u: F.relu(g) * u),
    "gpt-oss": (
        lambda v, g, u: (
            v.at_most(g, 7.0)
            * v.sigmoid(v.at_most(g, 7.0) * v.splat(1.702))
            * (v.clamp(u, -7.0, 7.0) + v.splat(1.0))
        ),
        lambda g, u: g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7)) * (u.clamp(-7, 7) + 1),
    ),
    "relu2": (lambda v, g: v.relu(g) * v.relu(g), lambda g: F.relu(g) ** 2),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_any_activation_is_an_epilogue(build, name):
    emit, meaning = ACTIVATIONS[name]
    v, gated = Vector(BEST), name != "relu2"
    spec = LinearSpec(32, 20, "float32", groups=2, gated=gated)
    weights = [torch.randn(2, 32, 20) * 0.4 for _ in range(1 + gated)]
    packed = torch.from_numpy(pack(Layout(spec, BEST), *weights))
    x, y = torch.randn(9, 20), torch.empty(9, 32)
    ends = torch.tensor([4, 9], dtype=torch.int32)
    build(BEST, grouped_linear(BEST, spec, lambda *parts: emit(v, *parts)))(x, ends, packed, y)
    check(y, expected(x, ends, weights, [], torch.ones(9, 1), meaning), "float32")


@cache
def small(build, top_k: int):
    spec = LinearSpec(20, 6, "float32", groups=6)
    weight = torch.randn(6, 20, 6)
    packed = torch.from_numpy(pack(Layout(spec, BEST), weight))
    return build(BEST, gathered_linear(BEST, spec, top_k)), weight, packed


@settings(max_examples=40)
@given(data=st.data(), tokens=st.integers(0, 30), top_k=st.sampled_from([1, 2, 6]))
def test_any_routing(build, data, tokens, top_k):
    """Empty experts, all on one, none owned (id 6), every expert for every token."""
    function, weight, packed = small(build, top_k)
    ids = data.draw(st.sampled_from([st.integers(0, 6), st.just(3), st.just(6)]))
    flat = data.draw(st.lists(ids, min_size=tokens * top_k, max_size=tokens * top_k))
    experts = torch.tensor(flat, dtype=torch.int64).reshape(tokens, top_k)
    order, ends = routing(experts, 6)
    x, y = torch.randn(tokens, 6), torch.full((tokens * top_k, 20), float("nan"))
    function(x, order, ends, packed, y)
    rows, ones = x[order.long() // top_k], torch.ones(tokens * top_k, 1)
    check(y, expected(rows, ends, [weight], [], ones, lambda p: p), "float32")


@pytest.mark.parametrize(("target", "dtype"), STREAMED)
def test_k_in_blocks_changes_no_bit(build, target, dtype):
    """For any cache size: an expert without rows, with one row, and with more rows than a block.
    Blocks of widened weights do not depend on it: see the next test."""
    spec = LinearSpec(70, 270, dtype, "float32", groups=4)
    x = torch.randn(PARTIAL_ROWS + 50, 270).to(DTYPES[dtype])
    ends = torch.tensor([PARTIAL_ROWS + 31, PARTIAL_ROWS + 31, PARTIAL_ROWS + 32, len(x)]).int()
    weight = torch.randn(4, 70, 270).to(DTYPES[dtype])
    results = []
    for l2 in (1, 1 << 20):
        of = replace(target, l2=l2)
        layout = Layout(spec, of)
        assert (layout.depth_block < layout.depth) == (l2 == 1)
        results.append(torch.full((len(x), 70), float("nan")))
        packed = torch.from_numpy(pack(layout, weight))
        build(of, grouped_linear(of, spec))(x, ends, packed, results[-1])
    assert torch.equal(*results)


@each_target
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_many_rows_and_few_give_the_same_bits(build, target, dtype):
    """An expert with more rows than a block, gathered; several tiles at a time, with fewer at the
    end; K in blocks, with a shorter, odd last block."""
    experts = 64
    v, spec = Vector(target), LinearSpec(1024, 301, dtype, "float32", groups=experts, gated=True)
    wide = 8 * Layout(spec, target).width + 6
    spec = replace(spec, n=wide)
    layout = Layout(spec, target)
    assert layout.tiles * experts >= 512
    weights = [torch.randn(experts, wide, 301).to(DTYPES[dtype]) for _ in range(2)]
    packed = torch.from_numpy(pack(layout, *weights))
    function = build(target, gathered_linear(target, spec, 1, lambda g, u: v.silu(g) * u))
    x = torch.randn(2 * PARTIAL_ROWS + 9, 301).to(DTYPES[dtype])
    owners = torch.full((len(x), 1), 3)
    owners[:7] = 5
    order, ends = routing(owners, experts)
    result = torch.full((len(x), wide), float("nan"))
    function(x, order, ends, packed, result)
    for at in (0, 6, 7, PARTIAL_ROWS + 6, PARTIAL_ROWS + 7, len(x) - 1):
        row = int((order == at).nonzero())
        order_of_one, ends_of_one = routing(owners[at : at + 1], experts)
        alone = torch.empty(1, wide)
        function(x[at : at + 1].clone(), order_of_one, ends_of_one, packed, alone)
        assert torch.equal(result[row : row + 1], alone), at


def test_tiles_of_many_experts_are_taken_several_at_once(build):
    """64 experts of five tiles: four together and one alone; some rows have no expert."""
    spec = LinearSpec(5 * 4 * BEST.vector_lanes - 3, 6, "float32", groups=64)
    layout = Layout(spec, BEST)
    assert layout.tiles * 64 >= 256
    weight = torch.randn(64, spec.n, 6)
    packed = torch.from_numpy(pack(layout, weight))
    experts = torch.cat([torch.randint(0, 65, (40, 1)), torch.full((30, 1), 7)])
    _, ends = routing(experts, 64)
    x, y = torch.randn(70, 6), torch.full((70, spec.n), float("nan"))
    build(BEST, grouped_linear(BEST, spec))(x, ends, packed, y)
    check(y, expected(x, ends, [weight], [], torch.ones(70, 1), lambda p: p), "float32")
