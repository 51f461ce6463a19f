"""The attention kernel against softmax(q k.T) v in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moec.codegen.build import assembly, compile_kernels
from moec.codegen.cpu.attention.attention import attention
from moec.codegen.specs.attention import AttentionSpec, MaskSpec
from moec.target.cpu import TARGETS, host, parse
from tests.fresh import Program, Warm

TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# Relative to attention over |v|. bf16: a weight and the result are rounded, 2^-8 each, and
# f16 rounds the result by 2^-11; f32: sums of D and of L terms, L + 2 D < 1024 roundings in
# the worst case, of which a sum in lanes and random signs leave an eighth.
TOLERANCE = {"f32": 2.0**-17, "bf16": 2.0**-7, "f16": 2.0**-10}


@cache
def kernel(spec: AttentionSpec) -> tvm.runtime.Module:
    return compile_kernels(attention(spec, host()), target=host())


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    sinks: Tensor | None = None
    first: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        optional = (self.mask, self.sinks, self.first)
        return [self.q, self.k, self.v, *(t for t in optional if t is not None)]


def random_inputs(spec: AttentionSpec, batch: int, queries: int, keys: int) -> Inputs:
    dtype = TORCH[spec.dtype]
    q = torch.randn(batch, spec.q_heads, queries, spec.key_dim).to(dtype)
    k = torch.randn(batch, spec.kv_heads, keys, spec.key_dim).to(dtype)
    v = torch.randn(batch, spec.kv_heads, keys, spec.value_dim).to(dtype)
    mask = sinks = first = None
    if spec.mask is not None:
        total = (batch, spec.q_heads, queries, keys)
        shape = [d if full else 1 for d, full in zip(total, spec.mask.full, strict=True)]
        mask = torch.rand(shape) < 0.7
        if spec.mask.dtype != "bool":
            mask = torch.where(mask, torch.randn(shape), -torch.inf).to(TORCH[spec.mask.dtype])
    if spec.sinks:
        sinks = torch.randn(spec.q_heads).to(dtype)
    if spec.placed:
        first = torch.randint(max(keys - queries, 0) + 1, (batch,))
        for sequence, begin in enumerate(first.tolist()):  # a cache holds anything after its end
            k[sequence, :, begin + queries :] = torch.nan
            v[sequence, :, begin + queries :] = torch.nan
    return Inputs(q, k, v, mask, sinks, first)


def shared(t: Tensor) -> tvm.runtime.Tensor:
    """The same memory; torch gives empty tensors strides that TVM takes for a gap."""
    if t.numel():
        return tvm.runtime.from_dlpack(t)
    return tvm.runtime.empty(t.shape, str(t.dtype).removeprefix("torch."))


def run(spec: AttentionSpec, x: Inputs) -> Tensor:
    out = torch.full((*x.q.shape[:3], spec.value_dim), torch.nan, dtype=x.q.dtype)
    tensors = [*x.tensors(), out]
    for name, position in (("q", 0), ("k", 1), ("v", 2), ("out", -1)):
        if name in spec.tokens_first:
            tensors[position] = tensors[position].transpose(1, 2).contiguous()
    kernel(spec)["attention"](*map(shared, tensors))
    return tensors[-1].transpose(1, 2) if "out" in spec.tokens_first else out


def expected(spec: AttentionSpec, x: Inputs) -> tuple[Tensor, Tensor]:
    """The result, and the same with |v|: the scale of its error."""
    q, k, v = (t.double() for t in (x.q, x.k, x.v))
    if x.first is not None:
        k, v = k.nan_to_num(), v.nan_to_num()
    k, v = (t.repeat_interleave(spec.group, 1) for t in (k, v))
    scores = q @ k.mT * spec.scale
    query, key = torch.arange(scores.shape[-2])[:, None], torch.arange(scores.shape[-1])
    if x.first is not None:
        query = x.first[:, None, None, None] + query
    if spec.is_causal:
        scores = scores.masked_fill(key > query, -torch.inf)
    if spec.window is not None:
        scores = scores.masked_fill(key <= query - spec.window, -torch.inf)
    if spec.chunk is not None:
        scores = scores.masked_fill(key // spec.chunk != query // spec.chunk, -torch.inf)
    if x.mask is not None:
        if x.mask.dtype == torch.bool:
            scores = scores.masked_fill(~x.mask, -torch.inf)
        else:
            scores = scores + x.mask.double()
    if x.sinks is not None:
        sinks = x.sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1).nan_to_num(0)
    return weights @ v, weights @ v.abs()


def check(spec: AttentionSpec, batch: int, queries: int, keys: int) -> None:
    x = random_inputs(spec, batch, queries, keys)
    want, scale = expected(spec, x)
    error = (run(spec, x).double() - want).abs()
    assert (error <= TOLERANCE[spec.dtype] * scale + 1e-7).all(), error.max()


ALL = (True, True, True, True)
OPERANDS = ("q", "k", "v", "out")
SPECS = {
    "plain": AttentionSpec("f32", 4, 4, 32, 32, 0.2),
    "causal": AttentionSpec("f32", 2, 2, 64, 64, 0.125, is_causal=True),
    "grouped-bf16": AttentionSpec("bf16", 6, 2, 64, 64, 0.125, is_causal=True),
    "mla-bf16": AttentionSpec("bf16", 2, 2, 48, 32, 0.15, is_causal=True),
    "uneven-bf16": AttentionSpec("bf16", 2, 1, 33, 41, 0.2),
    "uneven-f16": AttentionSpec("f16", 3, 1, 20, 24, 0.2, is_causal=True),
    "bool-mask": AttentionSpec("f32", 4, 2, 16, 16, 0.25, mask=MaskSpec("bool", ALL)),
    "f32-mask-bf16": AttentionSpec(
        "bf16", 4, 2, 32, 16, 0.2, mask=MaskSpec("f32", (True, False, True, True))
    ),
    "bf16-mask": AttentionSpec(
        "bf16", 4, 1, 64, 64, 0.2, mask=MaskSpec("bf16", (False, False, True, True))
    ),
    "row-mask": AttentionSpec(
        "f32", 4, 1, 16, 20, 0.2, mask=MaskSpec("bool", (True, True, True, False))
    ),
    "key-mask": AttentionSpec(
        "f32", 2, 1, 16, 16, 0.2, True, mask=MaskSpec("f32", (True, False, False, True))
    ),
    "sinks": AttentionSpec("f32", 4, 2, 16, 16, 0.25, sinks=True, is_causal=True),
    "sinks-bf16-mask": AttentionSpec(
        "bf16", 8, 1, 64, 64, 0.125, sinks=True, mask=MaskSpec("bf16", (True, False, True, True))
    ),
    "window": AttentionSpec("bf16", 4, 2, 32, 32, 0.2, True, window=37),
    "chunk-sinks": AttentionSpec("f32", 2, 1, 16, 16, 0.2, sinks=True, chunk=50),
    "window-chunk-mask": AttentionSpec(
        "f32", 2, 2, 16, 16, 0.2, mask=MaskSpec("bool", ALL), window=3, chunk=70
    ),
    "placed": AttentionSpec("f32", 4, 2, 16, 24, 0.25, True, placed=True),
    "placed-bf16": AttentionSpec("bf16", 8, 2, 64, 64, 0.2, True, placed=True),
    "placed-window-sinks": AttentionSpec(
        "bf16", 4, 1, 32, 32, 0.2, True, sinks=True, window=37, placed=True
    ),
    "placed-chunk": AttentionSpec("f32", 2, 2, 16, 16, 0.2, True, chunk=50, placed=True),
    "tokens-first": AttentionSpec("f32", 4, 2, 16, 24, 0.25, True, tokens_first=OPERANDS),
    "tokens-first-bf16": AttentionSpec("bf16", 4, 2, 64, 32, 0.25, tokens_first=OPERANDS),
    "tokens-first-k-out": AttentionSpec("f32", 4, 1, 24, 16, 0.2, True, tokens_first=("k", "out")),
    "tokens-first-placed": AttentionSpec(
        "bf16", 4, 2, 32, 32, 0.2, True, placed=True, tokens_first=("q", "out")
    ),
}
LAYOUTS = [*((name,) for name in OPERANDS), OPERANDS]
SIZES = [(1, 1, 1), (2, 1, 70), (1, 5, 300), (2, 7, 3), (1, 130, 130), (2, 65, 128)]


@pytest.mark.parametrize("name", SPECS)
def test_matches_eager(name: str) -> None:
    torch.manual_seed(0)
    for sizes in SIZES:
        check(SPECS[name], *sizes)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2), st.integers(0, 40), st.integers(0, 90), st.sampled_from(list(SPECS)))
def test_any_size(batch: int, queries: int, keys: int, name: str) -> None:
    check(SPECS[name], batch, queries, keys)


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_where_tokens_stand_changes_no_bit(layout: tuple[str, ...]) -> None:
    plain = SPECS["grouped-bf16"]
    for sizes in ((2, 3, 70), (1, 60, 60)):
        x = random_inputs(plain, *sizes)
        assert torch.equal(run(replace(plain, tokens_first=layout), x), run(plain, x))


@pytest.mark.parametrize("group", [1, 3, 8, 24])
@pytest.mark.parametrize("name", ["placed-bf16", "placed-window-sinks", "placed-chunk"])
def test_a_query_has_the_bits_that_it_has_alone(name: str, group: int) -> None:
    """As tokens that are verified together must: 8 of any group, 24 where each is one row."""
    spec = replace(SPECS[name], q_heads=2 * group, kv_heads=2)
    for queries in (2, max(8, 24 // group)):
        x = random_inputs(spec, 2, queries, 530)
        assert x.first is not None
        together = run(spec, x)
        for n in range(queries):
            alone = replace(x, q=x.q[:, :, n : n + 1].contiguous(), first=x.first + n)
            assert torch.equal(run(spec, alone), together[:, :, n : n + 1])


@pytest.mark.parametrize("queries", [2, 90])
def test_rows_that_see_nothing_are_zero_as_in_torch(queries: int) -> None:
    spec = SPECS["bool-mask"]
    x = random_inputs(spec, 1, queries, 70)
    assert x.mask is not None
    x.mask[:, :, 1] = False
    actual = run(spec, x)
    want = torch.nn.functional.scaled_dot_product_attention(
        x.q, x.k, x.v, attn_mask=x.mask, scale=spec.scale, enable_gqa=True
    )
    assert (actual[:, :, 1] == 0).all()
    assert (want[:, :, 1] == 0).all()
    torch.testing.assert_close(actual, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("queries", [1, 90])
def test_the_least_finite_mask_gives_the_mean(queries: int) -> None:
    """Models mask with the least float; a row of it is a softmax over equal scores."""
    spec = SPECS["f32-mask-bf16"]
    x = random_inputs(spec, 1, queries, 200)
    assert x.mask is not None
    x.mask[:] = torch.finfo(torch.float32).min
    mean = x.v.double().mean(2, keepdim=True).repeat_interleave(2, 1).expand(-1, -1, queries, -1)
    torch.testing.assert_close(run(spec, x).double(), mean, rtol=2.0**-7, atol=2.0**-9)


@pytest.mark.parametrize("queries", [1, 90])
def test_nan_stays_in_its_row(queries: int) -> None:
    spec = SPECS["causal"]
    x = random_inputs(spec, 1, queries, queries)
    x.q[0, 1, 0, 3] = torch.nan
    actual = run(spec, x)
    assert actual[0, 1, 0].isnan().all()
    assert actual.isnan().sum() == spec.value_dim


@pytest.mark.parametrize("queries", [3, 70])
def test_great_scores_do_not_overflow(queries: int) -> None:
    spec = SPECS["plain"]
    x = random_inputs(spec, 1, queries, 80)
    x = Inputs(x.q * 100, x.k * 100, x.v)
    want, _ = expected(spec, x)
    # Scores near 10^4 are known to 2^-10: the weights are as good as that.
    torch.testing.assert_close(run(spec, x).double(), want, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("name", "target"), [*(("bf16-mask", t) for t in TARGETS), ("uneven-f16", "generic")]
)
def test_compiles_for_every_target(name: str, target: str) -> None:
    code = assembly(attention(SPECS[name], TARGETS[target]), TARGETS[target])
    assert ("zmm" in code) == (TARGETS[target].vector_lanes == 16)
    assert ("tdpbf16ps" in code) == TARGETS[target].bf16_tiles


def test_compiles_for_haswell() -> None:
    compile_kernels(attention(SPECS["sinks"], TARGETS["avx2"]), target=parse("llvm:-mcpu=haswell"))


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="5 query heads cannot share 2 key heads"):
        AttentionSpec("f32", 5, 2, 8, 8, 1.0)


SCRIPT = """
import os, torch, tvm
from moec.codegen.build import assembly, compile_kernels
from moec.codegen.cpu.attention.attention import AttentionSpec, attention
from moec.codegen.cpu.routing.gate import GateSpec, gate
from moec.codegen.cpu.routing.route import RouteSpec
from moec.ir.ops.routing.routing import Routing
from moec.target.cpu import host

def build(f, name):
    return compile_kernels(f, target=host())[name]

torch.manual_seed(0)
kernel = build(attention(AttentionSpec("f32", 4, 2, 32, 32, 0.2, True), host()), "attention")
for queries, keys in ((3, 700), (150, 150)):
    q, out = torch.randn(1, 4, queries, 32), torch.empty(1, 4, queries, 32)
    k, v = torch.randn(2, 1, 2, keys, 32)
    kernel(*map(tvm.runtime.from_dlpack, (q, k, v, out)))
    print(out.numpy().tobytes().hex())
kernel = build(gate(GateSpec(RouteSpec(Routing(4), 40, "f32"), 50, "f32", "f32"), host()), "gate")
x, weight = torch.randn(90, 50), torch.randn(40, 50)
weights, experts = torch.empty(90, 4), torch.empty(90, 4, dtype=torch.int64)
kernel(*map(tvm.runtime.from_dlpack, (x, weight, weights, experts)))
print(weights.numpy().tobytes().hex(), experts.tolist())
assert tvm.get_global_func("runtime.NumThreads")() == min(THREADS, os.cpu_count())
"""


def test_results_do_not_depend_on_the_number_of_threads(
    warm: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_with_any_threads(SCRIPT, warm, tmp_path, monkeypatch)


def same_with_any_threads(
    script: str, warm: Warm, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = set()
    for threads in (1, 2):
        monkeypatch.setenv("TVM_NUM_THREADS", str(threads))
        result = warm.run(Program(script.replace("THREADS", str(threads))), folder)
        assert result.returncode == 0, result.stderr
        outputs.add(result.stdout)
    (output,) = outputs
    assert output
