"""Attention of a degree: ranks that split heads compute the results of one process, with and
without caches. Attention that cannot be split is not changed, with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from moec.ir.graph import Program, Stage
from moec.ir.interpret.evaluate import evaluate
from moec.ir.interpret.ranks import evaluate_ranks
from moec.ir.interpret.verifier import verify
from moec.ir.text import parse, print_graph
from moec.passes.core.runner import Log
from moec.passes.parallel.plan_parallelism import parallelise, rank_programs
from moec.plan.groups import groups_of
from moec.plan.plan import LayerPlan, Plan
from tests.passes.parallel.test_plan_parallelism import plan

WEIGHTS = "wq: f32[8, 6], wk: f32[4, 6], wv: f32[4, 6], bv: f32[4], wo: f32[6, 8], bo: f32[6]"
MAIN = f"""
graph main(x: f32[B, S, 6]; {WEIGHTS}, scale: f32[2]) {{
  size B in [0, inf]
  size S in [1, inf]
  q: f32[B, S, 8] = aten.linear.default(x, wq) @ attn
  q1: f32[B, S, 4, 2] = aten.reshape.default(q) <shape=({{B}}, {{S}}, 4, 2)> @ attn
  q2: f32[B, S, 4, 2] = nn.rms_norm(q1, scale) <epsilon=1e-06> @ attn
  q3: f32[B, 4, S, 2] = aten.permute.default(q2) <dims=(0, 2, 1, 3)> @ attn
  k: f32[B, S, 4] = aten.linear.default(x, wk) @ attn
  k1: f32[B, S, 2, 2] = aten.reshape.default(k) <shape=({{B}}, {{S}}, 2, 2)> @ attn
  k2: f32[B, 2, S, 2] = aten.permute.default(k1) <dims=(0, 2, 1, 3)> @ attn
  v: f32[B, S, 4] = aten.linear.default(x, wv, bv) @ attn
  v1: f32[B, S, 2, 2] = aten.reshape.default(v) <shape=({{B}}, {{S}}, 2, 2)> @ attn
  v2: f32[B, 2, S, 2] = aten.permute.default(v1) <dims=(0, 2, 1, 3)> @ attn
  y: f32[B, 4, S, 2] = nn.attention(q3, k2, v2) <scale=0.7, causal=true> @ attn
  y1: f32[B, S, 4, 2] = aten.permute.default(y) <dims=(0, 2, 1, 3)> @ attn
  y2: f32[B, S, 8] = aten.reshape.default(y1) <shape=({{B}}, {{S}}, 8)> @ attn
  out: f32[B, S, 6] = aten.linear.default(y2, wo, bo) @ attn
  z: f32[B, S, 6] = aten.add.Tensor(x, out)
  return z
}}"""
STEP = (
    MAIN.replace("graph main(x: f32[B, S, 6];", "graph step(x: f32[B, S, 6], first: i64[B], "
                 "keys: f32[B, 2, L, 2], values: f32[B, 2, L, 2];")
    .replace("  q: f32", "  size L in [1, inf]\n  q: f32", 1)
    .replace("  y: f32", "  ka: f32[B, 2, L, 2] = nn.append(keys, k2, first) @ attn\n"
             "  va: f32[B, 2, L, 2] = nn.append(values, v2, first) @ attn\n  y: f32", 1)
    .replace("(q3, k2, v2) <scale=0.7, causal=true>",
             "(q3, ka, va, first) <scale=0.7, causal=true, placed=true>")
    .replace("  return", "  state keys -> ka\n  state values -> va\n  return")
)  # fmt: skip

SINKS = MAIN.replace("scale: f32[2])", "scale: f32[2], s: f32[4])")
SINKS = SINKS.replace("(q3, k2, v2) <scale=0.7, causal=true>",
                      "(q3, k2, v2, s) <scale=0.7, causal=true, sinked=true>")  # fmt: skip
SINKS = SINKS.replace("causal=true, ", "causal=true, window=2, ")

# Queries and keys of DeepSeek-V3: a head's own part, and a turned one, which all keys share.
LATENT = """
graph main(x: f32[B, S, 6], cos: f32[1, 1, S, 2], sin: f32[1, 1, S, 2]; qa: f32[5, 6],
           qb: f32[16, 5], kva: f32[7, 6], kvb: f32[20, 3], wo: f32[6, 12], scale: f32[3]) {
  size B in [0, inf]
  size S in [1, inf]
  q: f32[B, S, 5] = aten.linear.default(x, qa) @ attn
  q1: f32[B, S, 16] = aten.linear.default(q, qb) @ attn
  q2: f32[B, S, 4, 4] = aten.reshape.default(q1) <shape=({B}, {S}, 4, 4)> @ attn
  q3: f32[B, 4, S, 4] = aten.permute.default(q2) <dims=(0, 2, 1, 3)> @ attn
  qn: f32[B, 4, S, 2], qr: f32[B, 4, S, 2] =
    aten.split_with_sizes.default(q3) <split_sizes=(2, 2), dim=-1> @ attn
  qt: f32[B, 4, S, 2] = nn.rotary(qr, cos, sin) @ attn
  q4: f32[B, 4, S, 4] = aten.cat.default(qn, qt) <tensors=($0, $1), dim=-1> @ attn
  c: f32[B, S, 7] = aten.linear.default(x, kva) @ attn
  c1: f32[B, S, 3], kr: f32[B, S, 4] =
    aten.split_with_sizes.default(c) <split_sizes=(3, 4), dim=-1> @ attn
  c2: f32[B, S, 3] = nn.rms_norm(c1, scale) <epsilon=1e-06> @ attn
  c3: f32[B, 1, S, 3] = aten.reshape.default(c2) <shape=({B}, 1, {S}, 3)> @ attn
  kr1: f32[B, S, 2] = aten.slice.Tensor(kr) <dim=2, start=0, end=2> @ attn
  kr2: f32[B, 1, S, 2] = aten.reshape.default(kr1) <shape=({B}, 1, {S}, 2)> @ attn
  kt: f32[B, 1, S, 2] = nn.rotary(kr2, cos, sin) @ attn
  kv: f32[B, 1, S, 20] = aten.linear.default(c3, kvb) @ attn
  kv1: f32[B, S, 4, 5] = aten.reshape.default(kv) <shape=({B}, {S}, 4, 5)> @ attn
  kv2: f32[B, 4, S, 5] = aten.permute.default(kv1) <dims=(0, 2, 1, 3)> @ attn
  kn: f32[B, 4, S, 2], v: f32[B, 4, S, 3] =
    aten.split_with_sizes.default(kv2) <split_sizes=(2, 3), dim=-1> @ attn
  ke: f32[B, 4, S, 2] = aten.expand.default(kt) <size=(-1, 4, -1, -1)> @ attn
  e: f32[B, 4, S, 4] = aten.empty.memory_format() <size=({B}, 4, {S}, 4), dtype=f32> @ attn
  e1: f32[B, 4, S, 2] = aten.slice.Tensor(e) <dim=3, start=0, end=2> @ attn
  e2: f32[B, 4, S, 2] = aten.copy.default(e1, kn) @ attn
  e3: f32[B, 4, S, 4] = aten.slice_scatter.default(e, e2) <dim=3, start=0, end=2> @ attn
  e4: f32[B, 4, S, 2] = aten.slice.Tensor(e3) <dim=3, start=2, end=4> @ attn
  e5: f32[B, 4, S, 2] = aten.copy.default(e4, ke) @ attn
  k: f32[B, 4, S, 4] = aten.slice_scatter.default(e3, e5) <dim=3, start=2, end=4> @ attn
  y: f32[B, 4, S, 3] = nn.attention(q4, k, v) <scale=0.7, causal=true> @ attn
  y1: f32[B, S, 4, 3] = aten.permute.default(y) <dims=(0, 2, 1, 3)> @ attn
  y2: f32[B, S, 12] = aten.reshape.default(y1) <shape=({B}, {S}, 12)> @ attn
  out: f32[B, S, 6] = aten.linear.default(y2, wo) @ attn
  z: f32[B, S, 6] = aten.add.Tensor(x, out)
  return z
}"""


def program(text: str) -> Program:
    generator, graph = torch.Generator().manual_seed(0), parse(text)
    weights = {
        p.name: torch.randn([int(d) for d in p.shape], generator=generator) for p in graph.params
    }
    return Program(graph, weights)


def shared(degree: int, devices: int = 2, layers: int = 1) -> Plan:
    layer = LayerPlan(layer=0, experts=0, attention=degree, seconds={})
    return structs.replace(plan(2), devices=devices, layers=(layer,) * layers)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Eight products of size 1 to 10, added in another order.
close = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("text", [MAIN, SINKS], ids=["plain", "sinks and a window"])
@settings(max_examples=20)
@given(counts=st.lists(st.integers(0, 3), min_size=4, max_size=4), tokens=st.integers(1, 4))
def test_ranks_together_are_the_model(text: str, counts: list[int], tokens: int) -> None:
    """Two groups of two ranks; a rank without texts has heads of the other's."""
    model, p = program(text), shared(2, devices=4)
    x = random(sum(counts), tokens, 6)
    results = evaluate_ranks(
        rank_programs(model, p), [[part] for part in x.split(counts)], groups_of(p)
    )
    expected = evaluate(model.graph, [x], model.weights)[0]
    torch.testing.assert_close(torch.cat([r[0] for r in results]), expected, **close)


@settings(max_examples=10)
@given(
    counts=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    tokens=st.integers(1, 4),
    degree=st.sampled_from([2, 4]),
)
def test_latent_attention(counts: list[int], tokens: int, degree: int) -> None:
    """Keys and values are computed from the gathered latent vectors, by the rank of their head."""
    model, p, log = program(LATENT), shared(degree, devices=4), Log()
    x, *angles = random(sum(counts), tokens, 6), *random(2, 1, 1, tokens, 2)
    module = rank_programs(model, p, log)
    assert not log.declined
    results = evaluate_ranks(module, [[part, *angles] for part in x.split(counts)], groups_of(p))
    expected = evaluate(model.graph, [x, *angles], model.weights)[0]
    torch.testing.assert_close(torch.cat([r[0] for r in results]), expected, **close)


def test_what_ranks_hold_of_latent_attention() -> None:
    model = program(LATENT)
    first, second = (parallelise(model, shared(2), rank, Log()).weights for rank in range(2))
    for name in ("qa", "kva"):
        assert torch.equal(first[name], model.weights[name])
    for name in ("qb", "kvb"):
        assert torch.equal(
            torch.cat([first[f"{name}_2"], second[f"{name}_2"]]), model.weights[name]
        )


@pytest.mark.parametrize("text", [MAIN, STEP, LATENT], ids=["main", "step", "latent"])
def test_text(text: str, golden: Callable[[str], None]) -> None:
    result = parallelise(program(text), shared(2), 1, Log())
    verify(result.graph, Stage.MOE)
    golden(print_graph(result.graph))


def test_caches_by_heads() -> None:
    """A prompt of three tokens and two of one each: caches hold some heads of all texts."""
    model, p, counts, room = program(STEP), shared(2), [1, 2], 5
    module = rank_programs(model, p)
    empty = torch.zeros(3, 2, room, 2)
    ours = [[empty[:, rank : rank + 1]] * 2 for rank in range(2)]
    theirs: Sequence[torch.Tensor] = [empty, empty]
    for start, tokens in ((0, 3), (3, 1), (4, 1)):
        x, first = random(3, tokens, 6, seed=start), torch.full((3,), start)
        expected, *theirs = evaluate(model.graph, [x, first, *theirs], model.weights)
        parts = zip(x.split(counts), first.split(counts), ours, strict=True)
        feeds = [[a, b, *caches] for a, b, caches in parts]
        results = evaluate_ranks(module, feeds, groups_of(p))
        torch.testing.assert_close(torch.cat([r[0] for r in results]), expected, **close)
        ours = [list(r[1:]) for r in results]
        for rank, caches in enumerate(ours):
            for actual, right in zip(caches, theirs, strict=True):
                torch.testing.assert_close(actual, right[:, rank : rank + 1], **close)


def test_a_rank_holds_its_heads_alone() -> None:
    model = program(MAIN)
    first, second = (parallelise(model, shared(2), rank, Log()).weights for rank in range(2))
    assert torch.equal(torch.cat([first["wk_2"], second["wk_2"]]), model.weights["wk"])
    assert torch.equal(torch.cat([first["wo_2"], second["wo_2"]], 1), model.weights["wo"])
    assert torch.equal(first["bo_2"], model.weights["bo"])
    assert not second["bo_2"].any()  # added once


GIVEN_SINKS = SINKS.replace(", s: f32[4])", ")").replace("6];", "6], s: f32[4];", 1)
PACKED = MAIN.replace("wq: f32[8, 6], wk: f32[4, 6]", "wq: f32[12, 6]")
PACKED = PACKED.replace(
    "  q: f32[B, S, 8] = aten.linear.default(x, wq) @ attn",
    """  qk: f32[B, S, 12] = aten.linear.default(x, wq) @ attn
  q: f32[B, S, 8] = aten.slice.Tensor(qk) <dim=2, start=0, end=8> @ attn""",
).replace("aten.linear.default(x, wk)", "aten.slice.Tensor(qk) <dim=2, start=8, end=12>")
TOKENS = MAIN.replace("causal=true>", 'causal=true, tokens_first=("q")>')
TOKENS = TOKENS.replace(
    "  q3: f32[B, 4, S, 2] = aten.permute.default(q2) <dims=(0, 2, 1, 3)> @ attn\n", ""
).replace("nn.attention(q3,", "nn.attention(q2,")
READ = MAIN.replace("  return z", "  w: f32[B, S, 4] = aten.neg.default(k)\n  return z, w")
TURNED = MAIN.replace(
    "  k2: f32", "  k0: f32[B, S, 2, 2] = aten.silu.default(k1) @ attn\n  k2: f32"
)
TURNED = TURNED.replace("permute.default(k1)", "permute.default(k0)")
SUMMED = LATENT.replace("ke: f32[B, 4, S, 2] =", "ks: f32[B, 4, S, 2] =", 1).replace(
    "  e: f32", "  ke: f32[B, 4, S, 2] = aten.softmax.int(ks) <dim=1> @ attn\n  e: f32", 1
)
JOINED = MAIN.replace("(q3, k2, v2)", "(q3, k3, v3)").replace(
    "  y: f32",
    """  k3: f32[B, 4, S, 2] = aten.cat.default(k2, k2) <tensors=($0, $1), dim=1> @ attn
  v3: f32[B, 4, S, 2] = aten.cat.default(v2, v2) <tensors=($0, $1), dim=1> @ attn
  y: f32""",
)
PIECES = MAIN.replace(
    "  y1: f32[B, S, 4, 2] = aten.permute.default(y)",
    """  ya: f32[B, 4, S, 1], yb: f32[B, 4, S, 1] =
    aten.split_with_sizes.default(y) <split_sizes=(1, 1), dim=-1> @ attn
  y0: f32[B, 4, S, 2] = aten.cat.default(yb, ya) <tensors=($0, $1), dim=-1> @ attn
  y1: f32[B, S, 4, 2] = aten.permute.default(y0)""",
)
GIVEN_KEYS = re.sub(r"  kr1: .*?(?=  kv: )", "", LATENT, flags=re.DOTALL).replace(
    "graph main(", "graph main(kt: f32[1, 1, S, 2], "
)
GIVEN_KEYS = GIVEN_KEYS.replace("size=(-1, 4, -1, -1)", "size=({B}, 4, -1, -1)")
FIXED = MAIN.replace("B, ", "2, ").replace("{B}", "2")
FIXED = FIXED.replace("  size B in [0, inf]\n", "")


@pytest.mark.parametrize(
    ("text", "degree", "reason"),
    [
        (MAIN, 4, "2 key-value heads cannot be split over 4 ranks"),
        (GIVEN_SINKS, 2, "s is computed from the inputs, not stored"),
        (PACKED, 2, "aten.slice.Tensor at attn mixes heads"),
        (TOKENS, 2, "only attention [B, heads, S, d] can be split by heads"),
        (READ, 2, "k is also read by aten.neg.default"),
        (TURNED, 2, "aten.silu.default at attn mixes heads"),
        (SUMMED, 2, "aten.softmax.int at attn mixes heads"),
        (JOINED, 2, "aten.cat.default at attn mixes heads"),
        (PIECES, 2, "aten.split_with_sizes.default at attn mixes heads"),
        (GIVEN_KEYS, 2, "aten.expand.default at attn mixes heads"),
        (FIXED, 2, "its number of texts is 2, no size of its own"),
    ],
    ids=[
        "too few",
        "sinks of a caller",
        "packed",
        "tokens first",
        "read",
        "silu",
        "summed",
        "joined",
        "pieces",
        "given keys",
        "fixed",
    ],
)
def test_attention_that_stays_whole(text: str, degree: int, reason: str) -> None:
    model, log = program(text), Log()
    result = parallelise(model, shared(degree, devices=4), 0, log)
    assert [d.reason for d in log.declined] == [f"attention of degree {degree}: {reason}"]
    assert [op.name for op in result.graph.ops] == [op.name for op in model.graph.ops]


def test_a_plan_of_other_layers() -> None:
    log = Log()
    parallelise(program(MAIN), shared(2, layers=2), 0, log)
    assert [d.reason for d in log.declined] == [
        "attention is replicated on every rank: the model has 1 attentions, the plan 2 layers"
    ]
